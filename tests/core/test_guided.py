"""Edge-guided filters against plain NumPy and against OpenCV."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.guided import (
    box_mean,
    bring_up,
    guided_filter,
    guided_upsample,
    joint_bilateral_upsample,
)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    guide = functional.interpolate(torch.rand(2, 3, 6, 7, generator=numbers), (24, 30))
    maps = torch.rand(2, 2, 24, 30, generator=numbers)
    return maps, guide + 0.02 * torch.rand(guide.shape, generator=numbers)


def _window(row: int, column: int, radius: int) -> tuple[slice, slice]:
    return slice(max(0, row - radius), row + radius + 1), slice(
        max(0, column - radius), column + radius + 1
    )


def _plain_guided_filter(
    mask: np.ndarray, guide: np.ndarray, radius: int, epsilon: float
) -> np.ndarray:
    """The definition: a ridge regression in every window, averaged over windows."""
    height, width = mask.shape
    slopes, offsets = np.zeros((height, width, 3)), np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            place = _window(row, column, radius)
            colours, values = guide[place].reshape(-1, 3), mask[place].reshape(-1)
            covariance = np.cov(colours.T, bias=True) + epsilon * np.eye(3)
            shared = ((colours - colours.mean(0)) * (values - values.mean())[:, None]).mean(0)
            slopes[row, column] = np.linalg.solve(covariance, shared)
            offsets[row, column] = values.mean() - slopes[row, column] @ colours.mean(0)
    found = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            place = _window(row, column, radius)
            slope = slopes[place].reshape(-1, 3).mean(0)
            found[row, column] = slope @ guide[row, column] + offsets[place].mean()
    return found


def test_guided_filter_is_its_definition(pair: tuple[Tensor, Tensor]) -> None:
    maps, guide = (tensor.double() for tensor in pair)
    found = guided_filter(maps, guide, 3, 1e-3)
    for image in range(2):
        picture = guide[image].permute(1, 2, 0).numpy()
        for count in range(2):
            expected = _plain_guided_filter(maps[image, count].numpy(), picture, 3, 1e-3)
            np.testing.assert_allclose(found[image, count].numpy(), expected, atol=1e-9)


def test_guided_filter_is_opencvs_away_from_borders(pair: tuple[Tensor, Tensor]) -> None:
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "ximgproc"):
        pytest.skip("OpenCV without its contributed modules")
    maps, guide = pair
    radius = 3
    found = guided_filter(maps, guide, radius, 1e-2)
    picture = np.ascontiguousarray(guide[0].permute(1, 2, 0).numpy())
    expected = cv2.ximgproc.guidedFilter(picture, maps[0, 0].numpy(), radius, 1e-2)
    inside = slice(2 * radius, -2 * radius)
    np.testing.assert_allclose(
        found[0, 0, inside, inside].numpy(), expected[inside, inside], atol=1e-4
    )


def test_box_mean_is_the_mean_of_the_window_that_exists() -> None:
    maps = torch.rand(1, 1, 5, 9)
    found = box_mean(maps, 2)[0, 0]
    for row in range(5):
        for column in range(9):
            torch.testing.assert_close(
                found[row, column], maps[0, 0][_window(row, column, 2)].mean()
            )


def test_upsampling_at_the_same_size_is_the_filter(pair: tuple[Tensor, Tensor]) -> None:
    maps, guide = pair
    torch.testing.assert_close(
        guided_upsample(maps, guide, 2, 1e-2), guided_filter(maps, guide, 2, 1e-2)
    )


def _plain_joint_bilateral(
    coarse: np.ndarray, guide: np.ndarray, radius: int, sigma_space: float, sigma_colour: float
) -> np.ndarray:
    (height, width), (rows, columns) = guide.shape[:2], coarse.shape
    down, right = height // rows, width // columns
    small = guide.reshape(rows, down, columns, right, 3).mean((1, 3))
    found = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            total = weights = 0.0
            for r in range(max(0, y // down - radius), min(rows, y // down + radius + 1)):
                for c in range(max(0, x // right - radius), min(columns, x // right + radius + 1)):
                    space = (r + 0.5 - (y + 0.5) / down) ** 2 + (c + 0.5 - (x + 0.5) / right) ** 2
                    colour = ((guide[y, x] - small[r, c]) ** 2).sum()
                    weight = np.exp(-space / (2 * sigma_space**2) - colour / (2 * sigma_colour**2))
                    total, weights = total + weight * coarse[r, c], weights + weight
            found[y, x] = total / weights
    return found


@pytest.mark.parametrize("radius", [1, 2])
def test_joint_bilateral_upsampling_is_its_definition(
    pair: tuple[Tensor, Tensor], radius: int
) -> None:
    guide = pair[1].double()
    coarse = torch.rand(2, 1, 8, 10, dtype=torch.float64)
    found = joint_bilateral_upsample(coarse, guide, radius, 0.8, 0.3)
    for image in range(2):
        picture = guide[image].permute(1, 2, 0).numpy()
        expected = _plain_joint_bilateral(coarse[image, 0].numpy(), picture, radius, 0.8, 0.3)
        np.testing.assert_allclose(found[image, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("how", ["guided", "joint_bilateral"])
def test_a_mask_comes_up_along_the_images_edge(how: str) -> None:
    # The edge lies within a coarse cell, where bilinear interpolation cannot see it.
    truth = (torch.arange(64) < 28).float().expand(64, 64)
    image = (truth * 2 - 1).expand(1, 3, 64, 64)
    coarse = functional.adaptive_avg_pool2d(truth[None], (8, 8))
    plain = (bring_up(coarse, image, "bilinear", 1, 1e-4) - truth).abs().mean()
    edged = (bring_up(coarse, image, how, 1, 1e-4) - truth).abs().mean()
    assert edged < plain / 3


def test_a_colour_found_nowhere_around_falls_back_to_bilinear() -> None:
    guide = torch.zeros(1, 3, 8, 8)
    guide[0, :, 3, 3] = 1.0
    coarse = torch.rand(1, 1, 2, 2)
    found = joint_bilateral_upsample(coarse, guide, 1, 1.0, 1e-3)
    expected = functional.interpolate(coarse, (8, 8), mode="bilinear")
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[..., 3, 3], expected[..., 3, 3])
