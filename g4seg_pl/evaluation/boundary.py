"""Scores near boundaries, where refinement lives: boundary IoU and trimap IoU.

Distances are in pixels of the label map, measured as chessboard distance (a square neighbourhood),
as the public implementation of boundary IoU does with its 3 by 3 erosions.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from g4seg_pl.evaluation.confusion import IGNORED_TRUTH, Counts, divide, in_mean

BOUNDARY_SHARE = 0.02

Mask = NDArray[np.bool_]


def boundary_counts(
    prediction: NDArray[Any], truth: NDArray[Any], num_classes: int, width: int | None = None
) -> tuple[Counts, Counts]:
    """Intersection and union of the inner boundary bands of every class (Cheng et al., 2021).

    A class's band is its own pixels within ``width`` of a pixel that is not of the class, the
    picture's border included. Pixels whose truth is 255 belong to no class on either side, so
    that a perfect prediction scores 1 whatever it says there.

    Args:
        prediction: label values ``(H, W)``.
        truth: label values ``(H, W)``, 255 ignored.
        num_classes: number of labels, background included.
        width: of the band; 2 % of the diagonal, at least 1, if None.

    Returns:
        intersection and union in pixels, each ``(num_classes,)``; sum them over the images.
    """
    distance = width if width is not None else boundary_width(*truth.shape)
    scored = truth != IGNORED_TRUTH
    intersection = np.zeros(num_classes, np.int64)
    union = np.zeros(num_classes, np.int64)
    for label in np.union1d(np.unique(truth[scored]), np.unique(prediction[scored])):
        if label >= num_classes:
            continue
        predicted = inner_band((prediction == label) & scored, distance)
        true = inner_band((truth == label) & scored, distance)
        intersection[label] = np.count_nonzero(predicted & true)
        union[label] = np.count_nonzero(predicted | true)
    return intersection, union


def mean_band_iou(bands: Counts, overlaps: Counts) -> float:
    """Mean boundary IoU over the classes that enter the mIoU, in [0, 1]; nan if none has a band.

    Args:
        bands: intersection and union of the bands of a data set, ``(2, C)``.
        overlaps: of whole images, ``(3, C)``.
    """
    iou = divide(bands[0], bands[1])[in_mean(overlaps)]
    found = iou[~np.isnan(iou)]
    return float(found.mean()) if found.size else float("nan")


def boundary_width(height: int, width: int) -> int:
    """2 % of the diagonal of an image, rounded, at least 1 pixel."""
    return max(1, round(BOUNDARY_SHARE * float(np.hypot(height, width))))


def inner_band(mask: Mask, width: int) -> Mask:
    """The pixels of ``mask`` ``(H, W)`` within ``width`` of its outside."""
    if mask.size == 0:
        return mask
    inside = mask.astype(np.uint8)
    # Beyond the picture's border nothing belongs to the mask.
    eroded = cv2.erode(inside, _square(width), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    band: Mask = mask & (eroded == 0)
    return band


def trimap(truth: NDArray[Any], width: int) -> NDArray[np.uint8]:
    """Truth with everything farther than ``width`` from a label change set to 255.

    Feed the result to :func:`~g4seg_pl.evaluation.confusion.confusion_matrix` for the trimap IoU
    of Kohli et al. (2009). In VOC the 255 strips around objects are label changes too.

    Args:
        truth: label values ``(H, W)``.
        width: of the band on either side of a change, in pixels, at least 1.

    Returns:
        uint8 ``(H, W)``.
    """
    change = np.zeros(truth.shape, bool)
    vertical = truth[1:] != truth[:-1]
    horizontal = truth[:, 1:] != truth[:, :-1]
    change[1:] |= vertical
    change[:-1] |= vertical
    change[:, 1:] |= horizontal
    change[:, :-1] |= horizontal
    near = cv2.dilate(change.astype(np.uint8), _square(width - 1)) if change.size else change
    return np.where(near > 0, truth, IGNORED_TRUTH).astype(np.uint8)


def _square(width: int) -> NDArray[np.uint8]:
    """The pixels within a chessboard distance, as OpenCV's structuring element."""
    return np.ones((2 * width + 1, 2 * width + 1), np.uint8)
