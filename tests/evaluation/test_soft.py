"""Threshold curves against one label map a threshold; calibration against a loop."""

import numpy as np
import pytest
import torch

from g4seg_pl.core.background import Threshold, compose_label
from g4seg_pl.evaluation.confusion import confusion_matrix
from g4seg_pl.evaluation.soft import (
    calibration_counts,
    expected_calibration_error,
    threshold_counts,
)

IDS = (2, 4)


def soft_image(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two soft maps and a truth with 255 in it."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(np.array([0, 2, 3, 4, 255], np.uint8), (9, 11))
    return rng.random((2, 9, 11), np.float32), truth


def test_every_threshold_is_that_of_the_label_map() -> None:
    maps, truth = soft_image(0)
    thresholds = [0.0, 0.25, 0.5, 0.9, 1.0]
    counts = threshold_counts(maps, IDS, truth, 5, thresholds)
    for threshold, found in zip(thresholds, counts, strict=True):
        label = compose_label(torch.from_numpy(maps), IDS, Threshold(threshold)).numpy()
        np.testing.assert_array_equal(found, confusion_matrix(label, truth, 5))


def test_a_score_on_the_threshold_is_background_as_in_the_label_map() -> None:
    # 51/255 is a little more than 0.2 in single precision, and no more than 0.2 there.
    maps = (np.arange(256, dtype=np.float32) / np.float32(255)).reshape(1, 16, 16)
    truth = np.full((16, 16), 2, np.uint8)
    thresholds = [0.2, 0.4, 0.6, 0.8]
    counts = threshold_counts(maps, (2,), truth, 3, thresholds)
    for threshold, found in zip(thresholds, counts, strict=True):
        label = compose_label(torch.from_numpy(maps), (2,), Threshold(threshold)).numpy()
        np.testing.assert_array_equal(found, confusion_matrix(label, truth, 3))


def test_calibration_error_is_that_of_a_loop_over_bins() -> None:
    maps, truth = soft_image(1)
    valid = truth != 255
    forecast = np.concatenate([maps[0][valid], maps[1][valid]]).astype(float)
    outcome = np.concatenate([truth[valid] == 2, truth[valid] == 4])
    error = 0.0
    for low in np.arange(10) / 10:
        chosen = (forecast >= low) & (forecast < low + 0.1)
        if chosen.any():
            distance = abs(forecast[chosen].mean() - outcome[chosen].mean())
            error += distance * chosen.sum() / len(forecast)
    counts = calibration_counts(maps, IDS, truth, bins=10)
    assert expected_calibration_error(counts) == pytest.approx(error)


def test_certain_and_right_is_calibrated() -> None:
    truth = np.array([[0, 2], [4, 255]], np.uint8)
    maps = np.stack([truth == 2, truth == 4]).astype(np.float32)
    assert expected_calibration_error(calibration_counts(maps, IDS, truth)) == 0
