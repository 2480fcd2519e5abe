"""Boundary bands against SciPy's erosion and brute-force distances."""

import numpy as np
import pytest
from scipy import ndimage

from g4seg_pl.evaluation.boundary import boundary_counts, boundary_width, inner_band, trimap


def blobs(seed: int, classes: int = 3, size: tuple[int, int] = (40, 52)) -> np.ndarray:
    """Smooth random label maps."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.random((classes, *size)), (0, 5, 5))
    return noise.argmax(axis=0).astype(np.uint8)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_band_is_mask_minus_its_erosion(width: int) -> None:
    mask = blobs(0) == 1
    square = np.ones((3, 3))
    eroded = ndimage.binary_erosion(mask, square, iterations=width)
    np.testing.assert_array_equal(inner_band(mask, width), mask & ~eroded)


@pytest.mark.parametrize("seed", range(3))
def test_perfect_prediction_scores_one_beside_ignored_pixels(seed: int) -> None:
    truth = blobs(seed)
    prediction = truth.copy()
    truth[10:14] = 255
    prediction[10:14] = 2
    intersection, union = boundary_counts(prediction, truth, 3)
    np.testing.assert_array_equal(intersection, union)
    assert union.sum() > 0


def test_shift_costs_more_at_the_boundary_than_in_the_area() -> None:
    truth = np.zeros((60, 60), np.uint8)
    truth[15:45, 15:45] = 1
    prediction = np.roll(truth, 2, axis=1)
    intersection, union = boundary_counts(prediction, truth, 2, width=2)
    area = (truth & prediction).sum() / (truth | prediction).sum()
    assert intersection[1] / union[1] < area - 0.3


def test_default_width_is_two_percent_of_the_diagonal() -> None:
    assert boundary_width(300, 400) == 10
    assert boundary_width(5, 5) == 1


@pytest.mark.parametrize("width", [1, 3])
def test_trimap_keeps_what_is_near_a_label_change(width: int) -> None:
    truth = blobs(2)
    beside = ndimage.generate_binary_structure(2, 1)
    low = ndimage.minimum_filter(truth, footprint=beside)
    high = ndimage.maximum_filter(truth, footprint=beside)
    far = ndimage.distance_transform_cdt(low == high, "chessboard")
    np.testing.assert_array_equal(trimap(truth, width) != 255, far < width)
    kept = trimap(truth, width) != 255
    np.testing.assert_array_equal(trimap(truth, width)[kept], truth[kept])
