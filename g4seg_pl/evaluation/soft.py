"""Scores of soft maps: the mIoU at every threshold, and how well they are calibrated."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g4seg_pl.evaluation.confusion import IGNORED_TRUTH, Counts, Fractions, divide

SoftMaps = NDArray[Any]


def threshold_counts(
    foreground: SoftMaps,
    class_ids: Sequence[int],
    truth: NDArray[Any],
    num_classes: int,
    thresholds: Sequence[float],
) -> Counts:
    """Confusion matrices of one image at every constant background score.

    The label is the class of the largest map where that exceeds the threshold, else background.
    All thresholds cost one pass over the pixels.

    Args:
        foreground: probabilities ``(K, H, W)`` in [0, 1].
        class_ids: label value of each map.
        truth: label values ``(H, W)``, 255 ignored.
        num_classes: number of labels, background included.
        thresholds: increasing.

    Returns:
        int64 ``(len(thresholds), num_classes, num_classes)``, rows are the truth; sum over the
        images and take :func:`~g4seg_pl.evaluation.confusion.mean_iou` of each.
    """
    scored = truth != IGNORED_TRUTH
    if not len(foreground):  # all of it is background at any threshold
        foreground, class_ids = np.zeros((1, *truth.shape)), (0,)
    height = foreground.max(axis=0)[scored]
    winner = np.asarray(class_ids, np.int64)[foreground.argmax(axis=0)[scored]]
    rows = truth[scored].astype(np.int64)
    # In the maps' own precision, as labels are composed: 51/255 is no more than 0.2 there.
    passed = np.searchsorted(np.asarray(thresholds, height.dtype), height, side="left")
    levels = len(thresholds)
    cells = (passed * num_classes + rows) * num_classes + winner
    histogram = np.bincount(cells, minlength=(levels + 1) * num_classes**2)
    histogram = histogram.reshape(levels + 1, num_classes, num_classes)
    kept = histogram[::-1].cumsum(axis=0)[::-1][1:]
    kept[:, :, 0] += histogram.sum(axis=(0, 2)) - kept.sum(axis=2)
    return kept.astype(np.int64, copy=False)


def calibration_counts(
    foreground: SoftMaps, class_ids: Sequence[int], truth: NDArray[Any], bins: int = 15
) -> Fractions:
    """What the calibration error needs from one image; sum it over the images.

    Every pixel of every map is one forecast of "this pixel is of this class".

    Args:
        foreground: probabilities ``(K, H, W)`` in [0, 1].
        class_ids: label value of each map.
        truth: label values ``(H, W)``, 255 ignored.
        bins: equal bins of [0, 1].

    Returns:
        ``(3, bins)``: number of forecasts, sum of their probabilities, how many came true.
    """
    scored = truth != IGNORED_TRUTH
    forecasts = np.asarray(foreground, float)[:, scored]
    outcomes = np.asarray(class_ids)[:, None] == truth[scored][None, :]
    cells = np.minimum((forecasts * bins).astype(np.int64), bins - 1).ravel()
    columns = (np.ones(cells.size), forecasts.ravel(), outcomes.ravel().astype(float))
    return np.stack([np.bincount(cells, weights=column, minlength=bins) for column in columns])


def expected_calibration_error(counts: Fractions) -> float:
    """Mean distance of forecast and frequency, weighted by forecasts (Naeini et al., 2015).

    Args:
        counts: ``(3, bins)`` from :func:`calibration_counts`, summed over the images.

    Returns:
        in [0, 1]; nan without forecasts.
    """
    number, probability, came_true = counts
    return float(divide(np.abs(probability - came_true).sum(), number.sum()))
