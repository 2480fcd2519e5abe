"""How pictures are laid out in memory on their way into a network, and how many go at once."""

from collections.abc import Callable

import torch
from torch import Tensor

# Of pictures in an autoencoder at once, at their full size: four of 512 x 512. They fill a GPU, and
# each takes half a gigabyte in bfloat16 while it is decoded.
_PIXELS = 2**20


def laid_out(pictures: Tensor, weight: Tensor) -> Tensor:
    """Return ``(b, c, h, w)`` on a weight's device, in its number format, channels last.

    Convolutions are made for that layout on GPUs and CPUs alike.
    """
    return pictures.to(weight).contiguous(memory_format=torch.channels_last)


def in_slices(network: Callable[[Tensor], Tensor], pictures: Tensor, pixels: int) -> Tensor:
    """Return what a network makes of ``(b, c, h, w)``, of few large pictures at a time.

    Args:
        network: called with slices of ``pictures``; its results are put together again.
        pictures: images or latents.
        pixels: of one image at its full size.
    """
    most = max(1, _PIXELS // pixels)
    if len(pictures) <= most:
        return network(pictures)
    return torch.cat([network(part) for part in pictures.split(most)])
