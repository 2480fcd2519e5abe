"""Standard errors against explicit resampling."""

import numpy as np
import pytest

from g4seg_pl.evaluation.bootstrap import bootstrap_mean_iou, paired_gain, resampled_mean_iou
from g4seg_pl.evaluation.confusion import mean_iou, overlaps_of


def matrices(seed: int, images: int = 20, classes: int = 4) -> np.ndarray:
    """Random confusion matrices with a heavy diagonal; some classes are missing in some images."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 20, (images, classes, classes))
    counts += np.eye(classes, dtype=int) * rng.integers(0, 200, (images, 1, 1))
    counts[rng.random(images) < 0.3, -1] = 0
    return counts


def test_resamples_are_those_of_drawn_images() -> None:
    counts = matrices(0)
    rng = np.random.default_rng(1)
    draws = rng.integers(0, len(counts), (7, len(counts)))
    weights = np.stack([np.bincount(draw, minlength=len(counts)) for draw in draws])
    expected = [mean_iou(counts[draw]) for draw in draws]
    found = resampled_mean_iou(overlaps_of(counts), weights.astype(float))
    np.testing.assert_allclose(found, expected)


def test_standard_error_is_near_that_of_many_explicit_draws() -> None:
    counts = matrices(2)
    rng = np.random.default_rng(3)
    draws = [mean_iou(counts[rng.integers(0, len(counts), len(counts))]) for _ in range(2000)]
    estimate = bootstrap_mean_iou(counts, resamples=2000)
    assert estimate.value == mean_iou(counts)
    assert estimate.standard_error == pytest.approx(np.std(draws), rel=0.1)
    assert estimate.interval[0] < estimate.value < estimate.interval[1]


def test_standard_error_of_two_draws_is_that_of_a_sample() -> None:
    """Of a and b it is |a - b| / √2; the interval from 2.5 to 97.5 % is 0.95 of their distance."""
    estimate = bootstrap_mean_iou(matrices(2), resamples=2)
    low, high = estimate.interval
    assert high > low
    assert estimate.standard_error == pytest.approx((high - low) / 0.95 / 2**0.5)


def test_gain_over_itself_is_exactly_nothing() -> None:
    counts = matrices(4)
    gain = paired_gain(counts, counts)
    assert (gain.value, gain.standard_error) == (0, 0)


def test_paired_error_is_smaller_than_that_of_either_run() -> None:
    before = matrices(5)
    after = before + np.eye(4, dtype=int) * 5
    gain = paired_gain(before, after)
    assert gain.value > 0
    assert gain.standard_error < bootstrap_mean_iou(before).standard_error / 2


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_gain(matrices(0), matrices(0, images=3))
