"""CLIP-ES's class-aware attention affinity: attention made symmetric, and boxes around a map."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor


def attention_affinity(
    layers: Sequence[Float[Tensor, "b n n"]], rounds: int = 3
) -> Float[Tensor, "b n n"]:
    """Return how much each patch takes from every other: two symmetric steps of attention.

    Args:
        layers: attention between patches, averaged over heads, rows summing to at most 1.
        rounds: of Sinkhorn's alternation, columns first.
    """
    matrix = torch.stack(list(layers)).float().mean(0)
    for _ in range(rounds):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(2, keepdim=True)
    matrix = (matrix + matrix.transpose(1, 2)) / 2
    return matrix @ matrix


def box_masks(maps: Float[Tensor, "m h w"], threshold: float) -> Float[Tensor, "m h w"]:
    """Return 1 inside the boxes around each connected bright part of a map.

    As in CLIP-ES, maps are taken in 256 steps, parts touch at corners too, and a box never
    covers the last row and column.

    Args:
        maps: in [0, 1].
        threshold: share of the map's maximum.
    """
    masks = np.zeros(tuple(maps.shape), dtype=np.float32)
    for mask, scores in zip(masks, maps.cpu().numpy(), strict=True):
        steps = (scores * 255).astype(np.uint8)
        bright = steps > int(threshold * int(steps.max()))
        parts, _ = ndimage.label(bright, structure=np.ones((3, 3)))
        for rows, columns in ndimage.find_objects(parts):
            mask[rows, columns] = 1
        # The box's far corner is clipped to the last pixel and then taken as excluded.
        mask[-1], mask[:, -1] = 0, 0
    return torch.from_numpy(masks).to(maps)
