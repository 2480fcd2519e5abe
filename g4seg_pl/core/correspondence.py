"""Semantic correspondence: where in the image a generated location belongs (Eq. 8-9)."""

import math
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

# Similarities formed at once: 16 MB in float32.
_BUDGET = 2**22


def nearest_neighbours(
    queries: Float[Tensor, "b c h w"],
    references: Float[Tensor, "b c h w"],
    exclude_radius: float = 0.0,
    chunk: int | None = None,
) -> Int[Tensor, "b n"]:
    """Return δ_j = argmax_j' cos(references[j'], queries[j]) for every location (Eq. 8).

    Args:
        queries: features of the image whose locations look for a partner.
        references: features of the image they look in.
        exclude_radius: partners at this distance or nearer, in cells, are not considered;
            0 considers all.
        chunk: rows of the n x n similarities formed at once, for each image of the batch; None
            takes as many as keep all of them within 16 MB in float32.

    Returns:
        Flat indices into the h·w grid, rows first.

    Raises:
        ValueError: the excluded neighbourhood covers the whole grid.
    """
    grid = (queries.shape[2], queries.shape[3])
    if exclude_radius > 0:
        _check_radius(exclude_radius, grid)
    if queries.device.type == "cpu" and len(queries) > 1:
        # A product of two matrices at a time takes half of what a batched one does there.
        pairs = zip(queries.split(1), references.split(1), strict=True)
        return torch.cat([nearest_neighbours(*pair, exclude_radius, chunk) for pair in pairs])
    wanted = queries.flatten(2)
    offered = functional.normalize(references.flatten(2), dim=1)
    batch, _, count = wanted.shape
    rows = max(1, _BUDGET // max(1, batch * count)) if chunk is None else chunk
    found = [
        _partners(wanted[:, :, begin : begin + rows], offered, begin, grid, exclude_radius)
        for begin in range(0, count, rows)
    ]
    return torch.cat(found, dim=1)


def discrepancy(
    queries: Float[Tensor, "b c h w"], references: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b h w"]:
    """Return 1 - cos of the features at the same place, clamped to [0, 1]."""
    return (1 - functional.cosine_similarity(queries, references, dim=1)).clamp(0, 1)


def matched_target(
    foreground: Float[Tensor, "m h w"], neighbours: Int[Tensor, "m n"]
) -> Float[Tensor, "m h w"]:
    """Return S[δ]: at every location, the mask's value where its partner lies."""
    return foreground.flatten(1).gather(1, neighbours).view_as(foreground)


def aligned_target(
    foreground: Float[Tensor, "m h w"], discrepancy: Float[Tensor, "m h w"]
) -> Float[Tensor, "m h w"]:
    """Return S + D(1 - 2S): where image and generation disagree, the mask turns over.

    This is the update without correspondence (δ_j = j). The paper does not print it; a location
    generated as object that does not look so is doubted as foreground, and the reverse.
    """
    return foreground + discrepancy * (1 - 2 * foreground)


def mix(
    foreground: Float[Tensor, "m H W"],
    coarse: Float[Tensor, "m h w"],
    target: Float[Tensor, "m h w"],
    beta: float,
    confidence_range: tuple[float, float] | None,
    carry: Literal["difference", "values"] = "difference",
) -> Float[Tensor, "m H W"]:
    """Return S* = βS + (1-β)·target, brought from the matching grid to the mask (Eq. 9).

    Args:
        foreground: S, in [0, 1].
        coarse: S on the matching grid.
        target: S[δ] on the matching grid, in [0, 1].
        beta: β; 1 returns ``foreground`` exactly.
        confidence_range: only pixels whose S lies in this closed range change; None for all.
        carry: ``difference`` interpolates target - coarse, so that fine edges of S survive;
            ``values`` interpolates the target itself.
    """
    size = (foreground.shape[1], foreground.shape[2])
    if carry == "difference":
        change = _upsample(target - coarse, size)
    else:
        change = _upsample(target, size) - foreground
    if confidence_range is not None:
        low, high = confidence_range
        change = change.where((foreground >= low) & (foreground <= high), 0.0)
    return (foreground + (1 - beta) * change).clamp(0, 1)


def _partners(
    wanted: Float[Tensor, "b c r"],
    offered: Float[Tensor, "b c n"],
    begin: int,
    grid: tuple[int, int],
    radius: float,
) -> Int[Tensor, "b r"]:
    # A function of its own, so that a strip is freed before the next one is formed.
    similarity = functional.normalize(wanted, dim=1).transpose(1, 2) @ offered
    if radius > 0:
        _exclude(similarity, begin, grid, radius)
    return _last_argmax(similarity)


def _last_argmax(values: Tensor) -> Tensor:
    if values.device.type != "cpu":
        return values.argmax(-1)
    # NumPy's is vectorised; PyTorch's is not, and took longer than the similarities themselves.
    known = values.float() if values.dtype == torch.bfloat16 else values  # NumPy has no bfloat16
    return torch.from_numpy(known.detach().numpy().argmax(-1))


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def _exclude(
    similarity: Float[Tensor, "b r n"], begin: int, grid: tuple[int, int], radius: float
) -> None:
    """Set the similarity of every location to its neighbourhood to minus infinity, in place."""
    height, width = grid
    rows = torch.arange(similarity.shape[1], device=similarity.device)
    down, right = (begin + rows) // width, (begin + rows) % width
    reach = range(-int(radius), int(radius) + 1)
    for above, left in product(reach, repeat=2):
        if math.hypot(above, left) <= radius:
            y, x = down + above, right + left
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            similarity[:, rows[inside], (y * width + x)[inside]] = -torch.inf


def _check_radius(radius: float, grid: tuple[int, int]) -> None:
    # The location with the nearest farthest partner is the centre; its partner is a corner.
    farthest = ((grid[0] // 2) ** 2 + (grid[1] // 2) ** 2) ** 0.5
    if radius >= farthest:
        message = f"exclude_radius is {radius} cells; on a grid of {grid} give less than {farthest}"
        raise ValueError(message)
