"""A random walk on the image grid that edges hold back (IRN, Ahn et al. 2019)."""

import math
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def colour_edges(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
    """Return the length of the colour gradient by central differences.

    Args:
        images: in [0, 1].
    """
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    across = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    down = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    return (across.square() + down.square()).sum(1).sqrt()


def random_walk(
    masks: Float[Tensor, "m h w"],
    edges: Float[Tensor, "m h w"],
    radius: int,
    beta: float,
    steps: int,
) -> Float[Tensor, "m h w"]:
    """Return the masks after steps of the walk T, rows normalised, that edges define.

    Args:
        masks: where the walk begins.
        edges: strength in [0, 1].
        radius: of the neighbourhood, in cells.
        beta: sharpens the affinity.
        steps: how many.
    """
    offsets = [
        (down, right)
        for down, right in product(range(-radius, radius + 1), repeat=2)
        if math.hypot(down, right) <= radius
    ]
    affinities = [(1 - _strongest(edges, offset)).pow(beta) for offset in offsets]
    total = torch.stack(affinities).sum(0)
    pairs = list(zip(affinities, offsets, strict=True))
    for _ in range(steps):
        moved = [a * _shifted(masks, offset, 0.0) for a, offset in pairs]
        masks = torch.stack(moved).sum(0) / total
    return masks


def _strongest(edges: Tensor, offset: tuple[int, int]) -> Tensor:
    """Return the strongest edge on the way from each cell to its neighbour; 1 off the grid."""
    if offset == (0, 0):
        return torch.zeros_like(edges)
    count = max(abs(offset[0]), abs(offset[1]))
    line = [(round(offset[0] * i / count), round(offset[1] * i / count)) for i in range(count + 1)]
    return torch.stack([_shifted(edges, point, 1.0) for point in line]).amax(0)


def _shifted(maps: Tensor, offset: tuple[int, int], beyond: float) -> Tensor:
    """Return at each cell the value of its neighbour at an offset."""
    reach = max(abs(offset[0]), abs(offset[1]))
    height, width = maps.shape[1:]
    padded = functional.pad(maps, (reach,) * 4, value=beyond)
    top, left = reach + offset[0], reach + offset[1]
    return padded[:, top : top + height, left : left + width]
