"""The data-set confusion matrix and what is read from it.

Everything here is NumPy on label maps at native size: scoring a folder of PNG files needs no torch.
Matrices are ``counts[truth, prediction]``; a leading axis, where there is one, is the image, so
that a score can be resampled over images afterwards.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Fractions = NDArray[np.float64]
Labels = NDArray[np.uint8]
Prediction255 = Literal["background", "exclude"]

IGNORED_TRUTH = 255


def confusion_matrix(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    num_classes: int,
    prediction_255: Prediction255 = "background",
) -> Counts:
    """Count the pixels of one image by true and predicted label.

    Pixels whose truth is 255 are never counted.

    Args:
        prediction: label values ``(H, W)``, 0 is background.
        truth: label values ``(H, W)``, 255 is ignored.
        num_classes: number of labels, background included.
        prediction_255: what a predicted 255 is: ``background`` scores it as label 0 (IRN's rule),
            ``exclude`` leaves the pixel out (CLIP-ES's rule).

    Returns:
        int64 ``(num_classes, num_classes)``, rows are the truth.

    Raises:
        ValueError: if the sizes differ, or a label is neither below ``num_classes`` nor 255.
    """
    if prediction.shape != truth.shape:
        msg = (
            f"prediction is {prediction.shape}, truth {truth.shape}: score at the truth's own size"
        )
        raise ValueError(msg)
    counted = truth != IGNORED_TRUTH
    if prediction_255 == "exclude":
        counted &= prediction != IGNORED_TRUTH
    rows = truth[counted].astype(np.int64)
    columns = prediction[counted].astype(np.int64)
    columns[columns == IGNORED_TRUTH] = 0
    _require_labels_below(rows, num_classes, "truth")
    _require_labels_below(columns, num_classes, "prediction")
    pairs = np.bincount(num_classes * rows + columns, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes).astype(np.int64, copy=False)


def _require_labels_below(labels: Counts, num_classes: int, name: str) -> None:
    """Raise if a label falls outside the matrix, naming it."""
    if labels.size and (worst := int(labels.max())) >= num_classes:
        msg = (
            f"{name} holds label {worst}, but the number of classes (background included) "
            f"is {num_classes}"
        )
        raise ValueError(msg)


def intersection_and_union(counts: Counts) -> tuple[Counts, Counts]:
    """Per-class intersection and union of confusion matrices ``(..., C, C)``: two ``(..., C)``."""
    intersection = np.diagonal(counts, axis1=-2, axis2=-1)
    union = counts.sum(axis=-1) + counts.sum(axis=-2) - intersection
    return intersection, union


def overlaps_of(counts: Counts) -> Counts:
    """All of a matrix that mIoU is made of, in 3 C numbers instead of C².

    Args:
        counts: ``(..., C, C)``.

    Returns:
        intersection, union and pixels in truth of every class, ``(..., 3, C)``.
    """
    return np.stack([*intersection_and_union(counts), counts.sum(axis=-1)], axis=-2)


def in_mean(overlaps: Counts) -> NDArray[np.bool_]:
    """Which labels of a data set enter a mean over classes.

    Those that occur in truth or prediction; label 0 only if the truth has it. A data set without a
    background (ADE20K, Context-59, NightCity) has no such class: pixels that a prediction leaves
    without a class are missed by their own classes, and no class of their own.

    Args:
        overlaps: ``(..., 3, C)`` of the whole data set, or of each of its resamples.

    Returns:
        ``(..., C)``.
    """
    entering = overlaps[..., 1, :] > 0
    entering[..., 0] &= overlaps[..., 2, 0] > 0
    return entering


def mean_overlap(overlaps: Counts) -> float:
    """The mIoU of overlaps ``(3, C)``, or ``(N, 3, C)``, which are summed first.

    Raises:
        ValueError: if no pixel was counted.
    """
    summed = overlaps if overlaps.ndim == 2 else overlaps.sum(axis=0)
    entering = in_mean(summed)
    if not entering.any():
        msg = "no pixel was counted: every truth pixel is 255, or there are no images"
        raise ValueError(msg)
    return float((summed[0, entering] / summed[1, entering]).mean())


def class_iou(counts: Counts) -> Fractions:
    """Intersection over union of every class.

    Args:
        counts: ``(..., C, C)``.

    Returns:
        ``(..., C)`` in [0, 1]; nan where a class is in neither truth nor prediction.
    """
    intersection, union = intersection_and_union(counts)
    return divide(intersection, union)


def mean_iou(counts: Counts) -> float:
    """The field's mIoU: mean over the classes that occur, as :func:`in_mean` says, in [0, 1].

    Args:
        counts: ``(C, C)``, or ``(N, C, C)`` of N images, which are summed first.

    Raises:
        ValueError: if no pixel was counted.
    """
    return mean_overlap(overlaps_of(total(counts)))


def pixel_accuracy(counts: Counts) -> float:
    """Share of the counted pixels whose label is right, in [0, 1]; nan without pixels."""
    matrix = total(counts)
    return float(divide(np.trace(matrix), matrix.sum()))


def total(counts: Counts) -> Counts:
    """Sum ``(N, C, C)`` over the images; a single ``(C, C)`` is returned as it is."""
    return counts if counts.ndim == 2 else counts.sum(axis=0)


def divide(numerator: Any, denominator: Any) -> Fractions:
    """Quotient in float64, nan where the denominator is 0, without a warning."""
    above, below = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    result = np.full(below.shape, np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result
