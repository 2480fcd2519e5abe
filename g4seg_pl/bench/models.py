"""Random-weight models on disk, in the formats that real ones come in."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from g4seg_pl.bench.sizes import Size
from g4seg_pl.callbacks.run_record import write_text_atomically
from g4seg_pl.world.text import write_tokenizer
from g4seg_pl.world.unet import MODEL_INDEX, build_scheduler

CONTEXT_LENGTH = 77


@dataclass(frozen=True)
class ModelFolders:
    """Where the models lie.

    Attributes:
        generator: a diffusers folder.
        clip: a transformers folder of the image encoder.
    """

    generator: Path
    clip: Path


def write_models(folder: Path, size: Size) -> ModelFolders:
    """Write the models of a size with random weights, unless they are there.

    Args:
        folder: kept or temporary; Stable Diffusion 2.1's size takes 2.6 GB.
        size: of the models.
    """
    found = ModelFolders(folder / size.name / "generator", folder / size.name / "clip")
    index = found.generator / "model_index.json"
    if index.is_file():
        return found
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _write_text(found.generator, size)
        build_unet(size).save_pretrained(found.generator / "unet")
        _stored(AutoencoderKL(**size.vae), size).save_pretrained(found.generator / "vae")
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**size.clip))
        _stored(clip, size).save_pretrained(found.clip)
    build_scheduler().save_pretrained(found.generator / "scheduler")
    # Last: where it lies, the folder is whole.
    write_text_atomically(index, json.dumps(MODEL_INDEX))
    return found


def build_unet(size: Size) -> UNet2DConditionModel:
    """A U-Net with fresh weights, in the number format it is stored in."""
    unet: UNet2DConditionModel = _stored(UNet2DConditionModel(**size.unet), size)
    return unet.eval().requires_grad_(requires_grad=False)


def _write_text(folder: Path, size: Size) -> None:
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        **size.text,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _stored(CLIPTextModel(config), size).save_pretrained(folder / "text_encoder")


def _stored(network: Any, size: Size) -> Any:
    return network.to(torch.bfloat16) if size.half else network
