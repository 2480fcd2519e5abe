"""Decoding by a distilled AutoencoderTiny (TAESD) in place of the autoencoder's own decoder.

Its latents are the U-Net's: it was trained on scaled ones, so its own ``scaling_factor`` is 1 where
an AutoencoderKL's is 0.18215 or so.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from g4seg_pl.backbones.kinds import read_part, require_hub_id
from g4seg_pl.types import ConfigurationError
from g4seg_pl.weights import load_whole

_EXAMPLES = "madebyollin/taesd for Stable Diffusion 1.x and 2.x, madebyollin/taesdxl for SDXL"
_COLOURS = 3


def check_decoder(decoder: str, model: str, revision: str | None = None) -> None:
    """Refuse a decoder that cannot read a model's latents; only configuration files are read.

    Two decoders of one shape that were trained on different latents, as TAESD's for Stable
    Diffusion and for SDXL were, cannot be told apart by their files.

    Args:
        decoder: a diffusers folder or hub id of an AutoencoderTiny.
        model: the generator's folder or hub id.
        revision: of the generator's hub id.

    Raises:
        ConfigurationError: names the decoder, what is wrong with it and the remedy.
    """
    tiny = _read_config(decoder)
    place = {"revision": revision} if revision else {}
    vae = read_part(_expanded(model), "vae", AutoencoderKL.load_config, **place)
    _require_fitting(decoder, tiny, vae)


def load_decoder(decoder: str, dtype: torch.dtype) -> AutoencoderTiny:
    """Load an AutoencoderTiny without its encoder.

    Args:
        decoder: a diffusers folder or hub id.
        dtype: number format of the weights; it was trained to bear float16.

    Raises:
        ConfigurationError: it cannot be loaded.
    """
    try:
        with torch.device("cpu"):  # as `read_part`
            tiny: AutoencoderTiny = load_whole(
                AutoencoderTiny.from_pretrained,
                _expanded(decoder),
                unused=("encoder.",),
                torch_dtype=dtype,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(_unreadable(decoder, error)) from error
    del tiny.encoder
    return tiny


def _read_config(decoder: str) -> Mapping[str, Any]:
    folder = Path(decoder).expanduser()
    if decoder and folder.is_dir():
        if not (folder / "config.json").is_file():
            inside = " (a whole pipeline?)" if (folder / "model_index.json").is_file() else ""
            message = (
                f"decoder folder {folder}{inside} has no config.json; give the folder of a "
                f"diffusers AutoencoderTiny, such as a copy of {_EXAMPLES}"
            )
            raise ConfigurationError(message)
        return _parsed(folder / "config.json")
    require_hub_id(decoder, "decoder")
    try:
        config: Mapping[str, Any] = AutoencoderTiny.load_config(decoder)
    except (OSError, ValueError) as error:
        raise ConfigurationError(_unreadable(decoder, error)) from error
    return config


def _parsed(file: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(_unreadable(str(file.parent), error)) from error
    return config if isinstance(config, dict) else {}


def _require_fitting(decoder: str, tiny: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuse by what the configurations say; what one leaves out is diffusers' default."""
    reads, made = (int(each.get("latent_channels", 4)) for each in (tiny, vae))
    stages = len(tiny.get("num_decoder_blocks", (3, 3, 3, 1))) - 1
    enlarges = int(tiny.get("upsampling_scaling_factor", 2)) ** stages
    shrinks = 2 ** (len(vae.get("block_out_channels", (64,))) - 1)
    colours = int(tiny.get("out_channels", 3))
    reason = None
    if tiny.get("_class_name") != "AutoencoderTiny":
        reason = f"it is a {tiny.get('_class_name')}, not an AutoencoderTiny"
    elif reads != made:
        reason = f"it reads latents of {reads} channels, the model's autoencoder makes {made}"
    elif enlarges != shrinks:
        reason = f"it enlarges latents {enlarges} times, the model's autoencoder {shrinks} times"
    elif colours != _COLOURS:
        reason = f"it makes pictures of {colours} channels, not {_COLOURS}"
    if reason is not None:
        message = f"decoder {decoder}: {reason}; give one made for this model ({_EXAMPLES})"
        raise ConfigurationError(message)


def _unreadable(decoder: str, error: BaseException) -> str:
    return f"decoder {decoder} cannot be loaded ({error}); check the folder or hub id"


def _expanded(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~") else name
