"""Bringing coarse masks up along the image's edges: guided filter and joint bilateral."""

from itertools import product
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Upsampling = Literal["bilinear", "guided", "joint_bilateral"]


def box_mean(maps: Float[Tensor, "b c h w"], radius: int) -> Float[Tensor, "b c h w"]:
    """Return the mean over squares of side 2·radius + 1, cut off at the borders."""
    side = 2 * radius + 1
    across = functional.avg_pool2d(maps, (1, side), 1, (0, radius), count_include_pad=False)
    return functional.avg_pool2d(across, (side, 1), 1, (radius, 0), count_include_pad=False)


def guided_filter(
    maps: Float[Tensor, "b c h w"],
    guide: Float[Tensor, "b g h w"],
    radius: int,
    epsilon: float,
) -> Float[Tensor, "b c h w"]:
    """Return maps that are locally linear in the guide (He et al. 2010, Eq. 14-16).

    Args:
        maps: what is filtered.
        guide: the image, one channel or more, in [0, 1].
        radius: of the square windows, in pixels.
        epsilon: squared contrast, per channel, below which an edge of the guide is smoothed over.
    """
    slope, offset = _local_lines(maps, guide, radius, epsilon)
    return (slope * guide[:, None]).sum(2) + offset


def guided_upsample(
    coarse: Float[Tensor, "b c h w"],
    guide: Float[Tensor, "b g H W"],
    radius: int,
    epsilon: float,
) -> Float[Tensor, "b c H W"]:
    """Return coarse maps at the guide's size (He and Sun 2015, the fast guided filter).

    The local lines are fitted on the coarse grid, brought up bilinearly, and applied to the fine
    guide.

    Args:
        coarse: the maps.
        guide: the image in [0, 1] at the size wanted.
        radius: of the square windows, in cells of the coarse grid.
        epsilon: squared contrast below which an edge is smoothed over.
    """
    batch, count, height, width = coarse.shape
    small = functional.adaptive_avg_pool2d(guide, (height, width))
    slope, offset = _local_lines(coarse, small, radius, epsilon)
    size = (guide.shape[2], guide.shape[3])
    slope = _bilinear(slope.flatten(1, 2), size).view(batch, count, guide.shape[1], *size)
    return (slope * guide[:, None]).sum(2) + _bilinear(offset, size)


def joint_bilateral_upsample(
    coarse: Float[Tensor, "b c h w"],
    guide: Float[Tensor, "b g H W"],
    radius: int,
    sigma_space: float,
    sigma_colour: float,
) -> Float[Tensor, "b c H W"]:
    """Return coarse maps at the guide's size by joint bilateral upsampling (Kopf et al. 2007).

    A pixel's value is the mean of the coarse cells around it, weighted by a Gaussian of their
    distance and one of the difference between the pixel's colour and the cell's.

    Args:
        coarse: the maps.
        guide: the image in [0, 1] at the size wanted.
        radius: of the square window, in coarse cells around the pixel's own.
        sigma_space: in coarse cells.
        sigma_colour: in units of the guide, over the Euclidean distance of its channels.
    """
    size, grid = (guide.shape[2], guide.shape[3]), (coarse.shape[2], coarse.shape[3])
    small = functional.adaptive_avg_pool2d(guide, grid)
    rows, columns = (_positions(n, m, guide) for n, m in zip(size, grid, strict=True))
    total, weights = guide.new_zeros(()), guide.new_zeros(())
    for down, right in product(range(-radius, radius + 1), repeat=2):
        near_rows = (rows.floor().long() + down).clamp(0, grid[0] - 1)
        near_columns = (columns.floor().long() + right).clamp(0, grid[1] - 1)
        space = (near_rows + 0.5 - rows)[:, None] ** 2 + (near_columns + 0.5 - columns) ** 2
        # Cells beyond the border do not exist; the clamped index would count the last one twice.
        inside = _exists(rows, down, grid[0])[:, None] & _exists(columns, right, grid[1])
        colour = guide - _cells(small, near_rows, near_columns)
        exponent = space / sigma_space**2 + colour.square().sum(1, keepdim=True) / sigma_colour**2
        weight = torch.exp(-exponent / 2) * inside
        total = total + weight * _cells(coarse, near_rows, near_columns)
        weights = weights + weight
    # Where no cell around has the pixel's colour at all, every weight underflows.
    tiny = torch.finfo(guide.dtype).tiny
    return torch.where(weights > tiny, total / weights.clamp_min(tiny), _bilinear(coarse, size))


def bring_up(
    coarse: Float[Tensor, "m h w"],
    images: Float[Tensor, "m 3 H W"],
    how: Upsampling,
    radius: int,
    epsilon: float,
) -> Float[Tensor, "m H W"]:
    """Return one coarse map an image at the images' size.

    Args:
        coarse: the maps.
        images: the image of each map, in [-1, 1].
        how: without regard to the image, or along its edges by a guided filter or by joint
            bilateral upsampling.
        radius: of the windows, in coarse cells.
        epsilon: squared contrast of images in [0, 1] below which an edge is smoothed over; the
            joint bilateral filter takes its square root as the width in colour, and half the
            radius as that in space.
    """
    size = (images.shape[2], images.shape[3])
    guide = (images.to(coarse.dtype) + 1) / 2
    match how:
        case "bilinear":
            return _bilinear(coarse[:, None], size)[:, 0]
        case "guided":
            return guided_upsample(coarse[:, None], guide, radius, epsilon)[:, 0]
        case "joint_bilateral":
            space, colour = max(radius / 2, 0.5), epsilon**0.5
            return joint_bilateral_upsample(coarse[:, None], guide, radius, space, colour)[:, 0]


def check_edges(radius: int, epsilon: float) -> None:
    """Refuse windows and contrasts without meaning.

    Raises:
        ValueError: the radius is below 1 or the contrast not positive.
    """
    if radius < 1:
        message = f"edge_radius is {radius}; give 1 or more cells"
        raise ValueError(message)
    if epsilon <= 0:
        message = f"edge_epsilon is {epsilon}; give a positive squared contrast, such as 1e-3"
        raise ValueError(message)


def _local_lines(
    maps: Tensor, guide: Tensor, radius: int, epsilon: float
) -> tuple[Float[Tensor, "b c g h w"], Float[Tensor, "b c h w"]]:
    """Return slope and offset of the best line in every window, averaged over the windows."""
    batch, count, height, width = maps.shape
    channels = guide.shape[1]
    mean_guide, mean_maps = box_mean(guide, radius), box_mean(maps, radius)
    pairs = (guide[:, :, None] * guide[:, None]).flatten(1, 2)
    spread = box_mean(pairs, radius).view(batch, channels, channels, height, width)
    spread = spread - mean_guide[:, :, None] * mean_guide[:, None]
    both = (maps[:, :, None] * guide[:, None]).flatten(1, 2)
    shared = box_mean(both, radius).view(batch, count, channels, height, width)
    shared = shared - mean_maps[:, :, None] * mean_guide[:, None]
    ridge = epsilon * torch.eye(channels, device=maps.device, dtype=maps.dtype)
    systems = spread.permute(0, 3, 4, 1, 2) + ridge
    solved = torch.linalg.solve(systems, shared.permute(0, 3, 4, 2, 1))
    slope = solved.permute(0, 4, 3, 1, 2)
    offset = mean_maps - (slope * mean_guide[:, None]).sum(2)
    mean_slope = box_mean(slope.flatten(1, 2), radius).view(slope.shape)
    return mean_slope, box_mean(offset, radius)


def _cells(maps: Tensor, rows: Tensor, columns: Tensor) -> Float[Tensor, "b c H W"]:
    # On CPUs two and a half times as fast as indexing by brackets.
    return maps.index_select(2, rows).index_select(3, columns)


def _positions(fine: int, coarse: int, like: Tensor) -> Float[Tensor, " n"]:
    """Return the fine pixels' centres in coarse cells."""
    return (torch.arange(fine, device=like.device, dtype=like.dtype) + 0.5) * coarse / fine


def _exists(positions: Tensor, offset: int, count: int) -> Tensor:
    index = positions.floor() + offset
    return (index >= 0) & (index < count)


def _bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False)
