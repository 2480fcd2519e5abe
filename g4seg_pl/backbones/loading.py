"""Loading a diffusers folder part by part; what cannot work is refused before any weights load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from lightning.pytorch import LightningModule
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from g4seg_pl.backbones.kinds import KINDS, Kind, check_model, read_network, read_part
from g4seg_pl.backbones.tiny_decoder import check_decoder, load_decoder
from g4seg_pl.core.protocols import PredictionType
from g4seg_pl.types import ConfigurationError

NumberFormat = Literal["auto", "float32", "bfloat16", "float16"]

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


@dataclass(frozen=True, kw_only=True)
class Components:
    """The parts of a Stable Diffusion model that the method uses.

    Attributes:
        unet: the denoiser.
        vae: the autoencoder; only its encoder where there is another decoder.
        text_encoder: CLIP's text model.
        tokenizer: its tokenizer.
        scheduler: the noise schedule the model was trained with.
        decoder: decodes instead of the autoencoder; None if the autoencoder does.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    decoder: AutoencoderTiny | None = None


@dataclass(frozen=True, kw_only=True)
class ComponentsXL(Components):
    """The parts of SDXL that the method uses.

    Attributes:
        text_encoder_2: the second text model, which also gives the pooled vector.
        tokenizer_2: its tokenizer.
        zero_empty_prompt: whether the model takes zeros for no prompt, as SDXL's base does.
    """

    text_encoder_2: CLIPTextModelWithProjection
    tokenizer_2: CLIPTokenizer
    zero_empty_prompt: bool


def load_components(
    model: str,
    dtype: torch.dtype,
    variant: str | None = None,
    revision: str | None = None,
    kinds: tuple[Kind, ...] = KINDS,
    decoder: str | None = None,
) -> Components:
    """Load U-Net, autoencoder, text encoders, tokenizers and schedule; never the whole pipeline.

    Args:
        model: a diffusers folder or a hub id such as ``owner/name``.
        dtype: number format of the weights; the autoencoder of SDXL stays float32 instead of
            float16 unless its configuration says that it can take it.
        variant: the weight files' variant, such as ``fp16``.
        revision: branch, tag or commit of a hub id.
        kinds: what the caller can use.
        decoder: folder or hub id of an AutoencoderTiny that decodes instead of the autoencoder,
            whose own decoder is not kept then.

    Returns:
        ``ComponentsXL`` for SDXL.

    Raises:
        ConfigurationError: a part is missing or of another kind; the message names the folder
            and the remedy, and no weights have been loaded.
    """
    kind = check_model(model, revision, kinds)
    if decoder is not None:
        check_decoder(decoder, model, revision)
    model = str(Path(model).expanduser()) if model.startswith("~") else model
    place: dict[str, Any] = {"revision": revision} if revision else {}
    files = place | ({"variant": variant} if variant else {})
    weights, text_weights = files | {"torch_dtype": dtype}, files | {"dtype": dtype}
    scheduler = _schedule(model, read_part(model, "scheduler", DDPMScheduler.load_config, **place))
    vae_config = read_part(model, "vae", AutoencoderKL.load_config, **place)
    _require_plain_latents(model, vae_config)
    vae_dtype = _vae_dtype(vae_config, dtype) if kind == "sdxl" else dtype
    unused = () if decoder is None else ("decoder.", "post_quant_conv.")
    parts: dict[str, Any] = {
        "unet": read_network(model, "unet", UNet2DConditionModel, **weights),
        "vae": read_network(
            model, "vae", AutoencoderKL, unused, **(weights | {"torch_dtype": vae_dtype})
        ),
        "text_encoder": read_network(model, "text_encoder", CLIPTextModel, **text_weights),
        "tokenizer": read_part(model, "tokenizer", CLIPTokenizer.from_pretrained, **place),
        "scheduler": scheduler,
        "decoder": None if decoder is None else load_decoder(decoder, dtype),
    }
    if decoder is not None:
        del parts["vae"].decoder, parts["vae"].post_quant_conv
    if kind == "stable_diffusion":
        return Components(**parts)
    return ComponentsXL(
        **parts,
        text_encoder_2=read_network(
            model, "text_encoder_2", CLIPTextModelWithProjection, **text_weights
        ),
        tokenizer_2=read_part(model, "tokenizer_2", CLIPTokenizer.from_pretrained, **place),
        zero_empty_prompt=_zero_empty_prompt(model, **place),
    )


def place_of(device: str | torch.device | None) -> torch.device:
    """Return the device named; of None a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def place_to_run(module: LightningModule) -> torch.device:
    """Where a module will run: while Lightning has it load its weights, it is still on the CPU."""
    trainer = module._trainer
    return module.device if trainer is None else trainer.strategy.root_device


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the number format named; ``auto`` is bfloat16 on a GPU and float32 elsewhere.

    Args:
        dtype: a `NumberFormat`, or torch's own.
        device: where the networks will run.

    Raises:
        ConfigurationError: networks are not loaded in such a format.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = dtype if isinstance(dtype, torch.dtype) else formats.get(dtype)
    if found is None or found not in formats.values():
        message = f"dtype is {dtype!r}; give auto, {', '.join(formats)} or torch's own of these"
        raise ConfigurationError(message)
    return found


def _schedule(model: str, config: dict[str, Any]) -> DDPMScheduler:
    options = {name: config[name] for name in _SCHEDULE if name in config}
    if options.get("trained_betas") is None and not {"beta_start", "beta_end"} <= options.keys():
        # DDPMScheduler would put its own betas in their place.
        message = (
            f"model {model}: scheduler/scheduler_config.json: no beta_start and beta_end (a "
            f"{config.get('_class_name')}; an EDM or flow-matching model?); give a model that was "
            "trained with a schedule of betas"
        )
        raise ConfigurationError(message)
    prediction = options.get("prediction_type", "epsilon")
    if config.get("use_flow_sigmas") or prediction not in get_args(PredictionType):
        message = (
            f"model {model}: scheduler/scheduler_config.json: prediction_type is {prediction!r}, "
            f"use_flow_sigmas {config.get('use_flow_sigmas', False)} (a flow-matching model?); "
            f"give a model that predicts one of {', '.join(get_args(PredictionType))}"
        )
        raise ConfigurationError(message)
    try:
        with torch.device("cpu"):  # as `read_part`
            return DDPMScheduler(**options)
    except NotImplementedError as error:
        message = f"model {model}: scheduler/scheduler_config.json: {error}"
        raise ConfigurationError(message) from error


def _require_plain_latents(model: str, config: dict[str, Any]) -> None:
    """Refuse latents scaled channel by channel; here one factor and one shift scale them all."""
    named = [name for name in ("latents_mean", "latents_std") if config.get(name) is not None]
    if named:
        message = (
            f"model {model}: vae/config.json: {named[0]} is {config[named[0]]}; latents that are "
            "normalised by channel (Playground's) are not known here, give a model without"
        )
        raise ConfigurationError(message)


def _vae_dtype(config: dict[str, Any], dtype: torch.dtype) -> torch.dtype:
    """SDXL's autoencoder overflows in float16, unless it is one that was mended."""
    forced = config.get("force_upcast", True)
    return torch.float32 if forced and dtype == torch.float16 else dtype


def _zero_empty_prompt(model: str, **place: Any) -> bool:
    """As the pipeline's own argument, which is True where a folder has no model_index.json."""
    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        return True
    try:
        config = DiffusionPipeline.load_config(model, **place)
    except OSError as error:
        message = f"model {model}: its model_index.json cannot be loaded ({error})"
        raise ConfigurationError(message) from error
    return bool(config.get("force_zeros_for_empty_prompt", True))
