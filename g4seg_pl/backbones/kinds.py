"""What kind of model a diffusers folder or hub id holds, from its configuration files alone."""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextConfig

from g4seg_pl.types import ConfigurationError
from g4seg_pl.weights import load_whole

Kind = Literal["stable_diffusion", "sdxl"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Height and width of the picture as it was, its crop's corner, and height and width as it is.
SIZE_NUMBERS = 6

_NAMES = {"stable_diffusion": "Stable Diffusion 1.x or 2.x (or LCM)", "sdxl": "SDXL"}
# Of a U-Net that is also told an embedding of a picture, a class or a noise level.
_MORE_INPUTS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",  # transformers 5 no longer writes vocab.json
    "scheduler": "scheduler_config.json",
}
_SECOND_TEXT = {"text_encoder_2": "config.json", "tokenizer_2": "tokenizer_config.json"}


def check_model(model: str, revision: str | None = None, kinds: Sequence[Kind] = KINDS) -> Kind:
    """Return a model's kind, or refuse one that cannot work; only configuration files are read.

    Args:
        model: a diffusers folder or a hub id.
        revision: branch, tag or commit of a hub id.
        kinds: what the caller can use.

    Raises:
        ConfigurationError: with the folder or id, what is wrong with it and the remedy.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        _require_parts(folder, {"unet": "config.json"}, kinds[0])
        config = _read_json(folder / "unet" / "config.json")
    else:
        require_hub_id(model)
        config = read_part(model, "unet", UNet2DConditionModel.load_config, revision=revision)
    kind = _kind(model, config, kinds)
    if folder.is_dir():
        parts = _PARTS | (_SECOND_TEXT if kind == "sdxl" else {})
        _require_parts(folder, parts, kind)
        for part in parts:
            if part.startswith("tokenizer"):
                _require_vocabulary(folder / part)
    if kind == "sdxl":
        _check_additions(str(folder) if folder.is_dir() else model, config, revision)
    return kind


def require_hub_id(model: str, what: str = "model") -> None:
    """Refuse what is neither a folder nor looks like a hub id.

    Args:
        model: the name.
        what: the argument it was given for.

    Raises:
        ConfigurationError: names it.
    """
    if not _HUB_ID.fullmatch(model):
        message = f"{what} {model!r} is no folder; give a diffusers folder or a hub id owner/name"
        raise ConfigurationError(message)


def read_part(model: str, part: str, load: Callable[..., Any], **options: Any) -> Any:
    """Return what ``load`` reads of one part of a model, its weights on the CPU.

    Lightning makes models within the context of their device, from which transformers would
    conclude that it is to place weights itself, for which it demands accelerate.

    Args:
        model: a diffusers folder or a hub id.
        part: name of the subfolder.
        load: ``from_pretrained`` or ``load_config`` of a class.
        options: further arguments of ``load``.

    Raises:
        ConfigurationError: it cannot be read; names model, part and remedy.
    """
    try:
        with torch.device("cpu"):
            return load(model, subfolder=part, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        message = (
            f"model {model}: its {part} cannot be loaded ({error}); check the folder or hub id, "
            "and `variant` if its weight files carry one"
        )
        raise ConfigurationError(message) from error


def read_network(
    model: str, part: str, network: Any, unused: tuple[str, ...] = (), **options: Any
) -> Any:
    """Return a network of a model, on the CPU, with every weight from its files.

    Args:
        model: a diffusers folder or a hub id.
        part: name of the subfolder.
        network: its class.
        unused: beginnings of the names of weights that may be missing.
        options: of its ``from_pretrained``.

    Raises:
        ConfigurationError: it cannot be read or lacks weights; names model, part and remedy.
    """
    load = partial(load_whole, network.from_pretrained, unused=unused)
    return read_part(model, part, load, **options)


def _require_parts(folder: Path, parts: dict[str, str], kind: Kind) -> None:
    for part, config in parts.items():
        if not (folder / part / config).is_file():
            names = ", ".join(_PARTS | (_SECOND_TEXT if kind == "sdxl" else {}))
            message = (
                f"model folder {folder}{_pipeline(folder)} has no {part}/{config}; give the folder "
                f"of a whole diffusers {_NAMES[kind]} model ({names})"
            )
            raise ConfigurationError(message)


def _require_vocabulary(tokenizer: Path) -> None:
    """Refuse a tokenizer without words, which transformers would make out of nothing."""
    whole, parts = ("tokenizer.json",), ("vocab.json", "merges.txt")
    if not any(all((tokenizer / name).is_file() for name in names) for names in (whole, parts)):
        message = (
            f"{tokenizer} has neither tokenizer.json nor vocab.json with merges.txt, so it knows "
            "no word; fetch the model's folder again"
        )
        raise ConfigurationError(message)


def _pipeline(folder: Path) -> str:
    """What the folder says it is, to be read after its name."""
    index = folder / "model_index.json"
    if not index.is_file():
        return ""
    return f" (a {_read_json(index).get('_class_name')})"


def _read_json(file: Path) -> dict[str, Any]:
    """The content of a configuration file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{file} is no JSON ({error}); fetch the model's folder again"
        raise ConfigurationError(message) from error
    if not isinstance(content, dict):
        message = f"{file} holds no configuration; fetch the model's folder again"
        raise ConfigurationError(message)
    return content


def _kind(model: str, config: dict[str, Any], kinds: Sequence[Kind]) -> Kind:
    unet, additions = config.get("_class_name"), config.get("addition_embed_type")
    kind: Kind = "stable_diffusion" if additions is None else "sdxl"
    reason = None
    if unet != "UNet2DConditionModel":
        reason = f"its unet is a {unet}"
    elif additions not in (None, "text_time"):
        reason = f"its unet takes additional embeddings of type {additions!r} (Kandinsky?)"
    elif config.get("in_channels") != config.get("out_channels"):
        reason = (
            f"its unet has {config.get('in_channels')} input and {config.get('out_channels')} "
            "output channels (an inpainting, depth or upscaling model?)"
        )
    elif more := [name for name in _MORE_INPUTS if config.get(name) is not None]:
        reason = (
            f"its unet has {more[0]} {config[more[0]]!r}: it is told more than a text (an unCLIP "
            "or class-conditioned model?)"
        )
    elif kind not in kinds:
        reason = f"it is {_NAMES[kind]}, which does not serve here"
    if reason is not None:
        wanted = " or ".join(_NAMES[name] for name in kinds)
        message = f"model {model}: {reason}; give a text-to-image {wanted}"
        raise ConfigurationError(message)
    return kind


def _check_additions(model: str, config: dict[str, Any], revision: str | None) -> None:
    """Refuse an SDXL U-Net that is told other things than a picture's sizes and a pooled text."""
    place = {"revision": revision} if revision else {}
    text = read_part(model, "text_encoder_2", CLIPTextConfig.from_pretrained, **place)
    sizes = SIZE_NUMBERS * int(config.get("addition_time_embed_dim") or 0)
    expected = sizes + int(text.projection_dim)
    given = config.get("projection_class_embeddings_input_dim")
    if given != expected:
        message = (
            f"model {model}: its unet's projection_class_embeddings_input_dim is {given}, not "
            f"{expected} (SDXL's refiner?); give a base model of SDXL"
        )
        raise ConfigurationError(message)
