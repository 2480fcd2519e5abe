"""Loading a diffusers folder part by part; what cannot work is refused before any weights load."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from g4seg_pl.types import ConfigurationError

NumberFormat = Literal["auto", "float32", "bfloat16", "float16"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",  # transformers 5 no longer writes vocab.json
    "scheduler": "scheduler_config.json",
}
# Only these count; a scheduler's sampling options do not apply to a single step.
_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True)
class Components:
    """The parts of a Stable Diffusion model that the method uses.

    Attributes:
        unet: the denoiser.
        vae: the autoencoder.
        text_encoder: CLIP's text model.
        tokenizer: its tokenizer.
        scheduler: the noise schedule the model was trained with.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler


def load_components(
    model: str, dtype: torch.dtype, variant: str | None = None, revision: str | None = None
) -> Components:
    """Load U-Net, autoencoder, text encoder, tokenizer and schedule; never the whole pipeline.

    Args:
        model: a diffusers folder or a hub id such as ``owner/name``.
        dtype: number format of the weights.
        variant: the weight files' variant, such as ``fp16``.
        revision: branch, tag or commit of a hub id.

    Raises:
        ConfigurationError: a part is missing or is not of Stable Diffusion 1.x or 2.x; the
            message names the folder and the remedy, and no weights have been loaded.
    """
    check_model(model, revision)
    model = str(Path(model).expanduser()) if model.startswith("~") else model
    place = {"revision": revision} if revision else {}
    weights = place | {"torch_dtype": dtype} | ({"variant": variant} if variant else {})
    text_weights = place | {"dtype": dtype} | ({"variant": variant} if variant else {})
    schedule = _read(model, "scheduler", DDPMScheduler.load_config, **place)
    return Components(
        unet=_read(model, "unet", UNet2DConditionModel.from_pretrained, **weights),
        vae=_read(model, "vae", AutoencoderKL.from_pretrained, **weights),
        text_encoder=_read(model, "text_encoder", CLIPTextModel.from_pretrained, **text_weights),
        tokenizer=_read(model, "tokenizer", CLIPTokenizer.from_pretrained, **place),
        scheduler=_schedule(model, schedule),
    )


def check_model(model: str, revision: str | None = None) -> None:
    """Refuse a model that cannot work, reading configuration files only.

    Args:
        model: a diffusers folder or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        ConfigurationError: with the folder or id, what is wrong with it and the remedy.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        _check_folder(folder)
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    elif _HUB_ID.fullmatch(model):
        config = _read(model, "unet", UNet2DConditionModel.load_config, revision=revision)
    else:
        message = f"model {model!r} is no folder; give a diffusers folder or a hub id owner/name"
        raise ConfigurationError(message)
    _check_unet(model, config)


def resolve_dtype(dtype: NumberFormat, device: torch.device) -> torch.dtype:
    """Return the number format named; ``auto`` is bfloat16 on a GPU and float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[dtype]


def _check_folder(folder: Path) -> None:
    for part, config in _PARTS.items():
        if not (folder / part / config).is_file():
            message = (
                f"model folder {folder} has no {part}/{config}; give the folder of a whole "
                "diffusers Stable Diffusion model (unet, vae, text_encoder, tokenizer, scheduler)"
            )
            raise ConfigurationError(message)


def _check_unet(model: str, config: dict[str, Any]) -> None:
    kind = config.get("_class_name")
    reason = None
    if kind != "UNet2DConditionModel":
        reason = f"its unet is a {kind}"
    elif config.get("addition_embed_type") is not None:
        reason = f"its unet takes additional embeddings ({config['addition_embed_type']}; SDXL?)"
    elif config.get("in_channels") != config.get("out_channels"):
        reason = (
            f"its unet has {config.get('in_channels')} input and {config.get('out_channels')} "
            "output channels (an inpainting, depth or upscaling model?)"
        )
    if reason is not None:
        message = f"model {model}: {reason}; give a text-to-image Stable Diffusion 1.x or 2.x"
        raise ConfigurationError(message)


def _read(model: str, part: str, load: Callable[..., Any], **options: Any) -> Any:
    try:
        return load(model, subfolder=part, **options)
    except (OSError, ValueError) as error:
        message = (
            f"model {model}: its {part} cannot be loaded ({error}); check the folder or hub id, "
            "and `variant` if its weight files carry one"
        )
        raise ConfigurationError(message) from error


def _schedule(model: str, config: dict[str, Any]) -> DDPMScheduler:
    options = {name: config[name] for name in _SCHEDULE if name in config}
    try:
        return DDPMScheduler(**options)
    except NotImplementedError as error:
        message = f"model {model}: scheduler/scheduler_config.json: {error}"
        raise ConfigurationError(message) from error
