"""What a diffusers pipeline itself asks of its U-Net, to be compared with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Pass:
    """One call of a network: its inputs and its output.

    Attributes:
        sample: the noisy latent.
        timestep: t.
        told: every keyword.
        output: the first thing returned.
    """

    sample: Tensor
    timestep: int
    told: dict[str, Any]
    output: Tensor


def first_pass(pipeline: Any, network: nn.Module, **call: Any) -> Pass:
    """Run a pipeline and return the first call that its network got."""
    seen: list[Pass] = []

    def keep(_: nn.Module, given: tuple[Any, ...], told: dict[str, Any], output: Any) -> None:
        seen.append(Pass(given[0], int(given[1]), told, output[0]))

    handle = network.register_forward_hook(keep, with_kwargs=True)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    pipeline.set_progress_bar_config(disable=True)
    try:
        pipeline(latents=latents, height=64, width=64, output_type="latent", **call)
    finally:
        handle.remove()
    return seen[0]
