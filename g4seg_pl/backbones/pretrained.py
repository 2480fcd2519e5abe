"""The generator that a folder or hub id holds, chosen by its own configuration."""

import torch

from g4seg_pl.backbones.kinds import check_model
from g4seg_pl.backbones.sdxl import StableDiffusionXL
from g4seg_pl.backbones.stable_diffusion import StableDiffusion


def load_generator(
    model: str,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    revision: str | None = None,
    embedded_guidance: float = 0.0,
    decoder: str | None = None,
) -> StableDiffusion:
    """Load Stable Diffusion 1.x or 2.x, an LCM with their layout, or SDXL.

    Args:
        model: a diffusers folder or hub id.
        dtype: number format of the weights.
        variant: the weight files' variant, such as ``fp16``.
        revision: branch, tag or commit of a hub id.
        embedded_guidance: w of an LCM; 0 is no guidance.
        decoder: folder or hub id of an AutoencoderTiny that decodes instead of the model's own
            autoencoder.

    Raises:
        ConfigurationError: a part is missing or of another kind of model.
    """
    kind = check_model(model, revision)
    made = StableDiffusionXL if kind == "sdxl" else StableDiffusion
    return made.from_pretrained(model, dtype, variant, revision, embedded_guidance, decoder)
