"""Guidance as an input of the U-Net, which latent consistency models take with the timestep."""

import torch
from jaxtyping import Float
from torch import Tensor

# Guidance is scaled like a timestep before its sines and cosines are taken.
_SCALE = 1000.0
_LONGEST_PERIOD = 10000.0


def guidance_embedding(guidance: float, size: int) -> Float[Tensor, "1 size"]:
    """Return the sines and cosines of w (Luo et al. 2023, Latent Consistency Models), float32.

    The distilled model stands for (1 + w)·ε(prompt) - w·ε(no prompt) in one pass.

    Args:
        guidance: w; 0 is no guidance.
        size: width of the embedding, the U-Net's ``time_cond_proj_dim``, at least 4.
    """
    half = size // 2
    rates = torch.logspace(0, -1, half, base=_LONGEST_PERIOD, dtype=torch.float32, device="cpu")
    angles = _SCALE * guidance * rates
    waves = torch.cat([angles.sin(), angles.cos()])
    return torch.nn.functional.pad(waves, (0, size - 2 * half))[None]
