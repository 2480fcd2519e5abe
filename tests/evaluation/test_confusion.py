"""The confusion matrix against a NumPy histogram and torchmetrics."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from g4seg_pl.evaluation.bootstrap import bootstrap_mean_iou, resampled_mean_iou
from g4seg_pl.evaluation.confusion import (
    class_iou,
    confusion_matrix,
    mean_iou,
    overlaps_of,
    pixel_accuracy,
)

CLASSES = 6


def label_maps(seed: int, images: int = 4, share_ignored: float = 0.1) -> tuple[np.ndarray, ...]:
    """Random truths with 255 in them, and predictions that agree with them half the time."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, CLASSES - 1, (images, 13, 17), dtype=np.uint8)
    guess = rng.integers(0, CLASSES - 1, truth.shape, dtype=np.uint8)
    prediction = np.where(rng.random(truth.shape) < 0.5, truth, guess).astype(np.uint8)
    truth[rng.random(truth.shape) < share_ignored] = 255
    return prediction, truth


@given(st.integers(0, 10_000), st.floats(0, 0.9))
def test_counts_are_those_of_a_two_dimensional_histogram(seed: int, share: float) -> None:
    prediction, truth = label_maps(seed, share_ignored=share)
    valid = truth != 255
    bins = np.arange(CLASSES + 1)
    expected, *_ = np.histogram2d(truth[valid], prediction[valid], bins=(bins, bins))
    np.testing.assert_array_equal(confusion_matrix(prediction, truth, CLASSES), expected)


def test_a_background_that_the_truth_has_not_is_no_class() -> None:
    """As ADE20K is scored: what is left without a class is missed by its own, nothing more."""
    prediction, truth = label_maps(0)
    truth[truth == 0] = 255
    prediction[:, :, :3] = 0
    pairs = zip(prediction, truth, strict=True)
    counts = np.stack([confusion_matrix(*pair, CLASSES) for pair in pairs])
    found, right = prediction[truth != 255], truth[truth != 255]
    iou = [
        ((right == label) & (found == label)).sum() / ((right == label) | (found == label)).sum()
        for label in range(1, CLASSES - 1)
    ]
    assert mean_iou(counts) == pytest.approx(np.mean(iou))
    assert bootstrap_mean_iou(counts, 10).value == pytest.approx(np.mean(iou))
    weights = np.ones((1, len(counts)))
    assert resampled_mean_iou(overlaps_of(counts), weights)[0] == pytest.approx(np.mean(iou))


@pytest.mark.parametrize("seed", range(5))
def test_mean_iou_is_that_of_torchmetrics(seed: int) -> None:
    prediction, truth = label_maps(seed)
    counts = np.stack(
        [confusion_matrix(p, t, CLASSES) for p, t in zip(prediction, truth, strict=True)]
    )
    metric = MulticlassJaccardIndex(CLASSES, average="macro", ignore_index=255)
    metric.update(torch.from_numpy(prediction).long(), torch.from_numpy(truth).long())
    assert mean_iou(counts) == pytest.approx(metric.compute().item(), abs=1e-6)


def test_class_in_neither_map_does_not_count() -> None:
    prediction, truth = label_maps(0)
    counts = confusion_matrix(prediction, truth, CLASSES)
    assert np.isnan(class_iou(counts)[CLASSES - 1])
    assert mean_iou(counts) == pytest.approx(np.mean(class_iou(counts)[: CLASSES - 1]))


def test_perfect_prediction_scores_one() -> None:
    _, truth = label_maps(1)
    counts = confusion_matrix(np.where(truth == 255, 0, truth), truth, CLASSES)
    assert mean_iou(counts) == 1
    assert pixel_accuracy(counts) == 1


def test_predicted_255_is_background_or_excluded() -> None:
    truth = np.array([[0, 0, 1, 1]], np.uint8)
    prediction = np.array([[255, 0, 255, 1]], np.uint8)
    as_background = confusion_matrix(prediction, truth, 2, "background")
    excluded = confusion_matrix(prediction, truth, 2, "exclude")
    np.testing.assert_array_equal(as_background, [[2, 0], [1, 1]])
    np.testing.assert_array_equal(excluded, [[1, 0], [0, 1]])


@pytest.mark.parametrize("name", ["prediction", "truth"])
def test_label_beyond_the_classes_is_refused_by_name(name: str) -> None:
    maps = {"prediction": np.zeros((2, 2), np.uint8), "truth": np.zeros((2, 2), np.uint8)}
    maps[name][0, 0] = 7
    with pytest.raises(ValueError, match=f"{name} holds label 7"):
        confusion_matrix(**maps, num_classes=3)


def test_other_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        confusion_matrix(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), 2)


def test_no_counted_pixel_is_refused() -> None:
    ignored = np.full((2, 2), 255, np.uint8)
    with pytest.raises(ValueError, match="no pixel was counted"):
        mean_iou(confusion_matrix(np.zeros((2, 2), np.uint8), ignored, 2))
