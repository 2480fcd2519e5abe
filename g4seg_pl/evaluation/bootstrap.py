"""Standard errors by resampling images: of a score, and of the gain between two runs."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from g4seg_pl.evaluation.confusion import (
    Counts,
    Fractions,
    divide,
    in_mean,
    mean_overlap,
    overlaps_of,
)

_RESAMPLES_AT_ONCE = 50


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap uncertainty over images.

    Attributes:
        value: on the images as they are.
        standard_error: standard deviation over the resamples.
        interval: 2.5 % and 97.5 % quantiles of the resamples.
    """

    value: float
    standard_error: float
    interval: tuple[float, float]


def bootstrap_mean_iou(counts: Counts, resamples: int = 1000, seed: int = 0) -> Estimate:
    """The mIoU of N images with its standard error.

    Args:
        counts: confusion matrices ``(N, C, C)``, one an image.
        resamples: how many times N images are drawn with replacement.
        seed: of the draws.

    Returns:
        the estimate, in [0, 1].
    """
    return bootstrap_overlaps(overlaps_of(counts), resamples, seed)


def paired_gain(before: Counts, after: Counts, resamples: int = 1000, seed: int = 0) -> Estimate:
    """The gain in mIoU from ``before`` to ``after`` on the same images, with its standard error.

    Args:
        before: confusion matrices ``(N, C, C)``.
        after: confusion matrices ``(N, C, C)`` of the same images in the same order.
        resamples: how many times N images are drawn with replacement.
        seed: of the draws.

    Returns:
        the estimate, in [-1, 1].

    Raises:
        ValueError: if the shapes differ.
    """
    return paired_overlaps(overlaps_of(before), overlaps_of(after), resamples, seed)


def bootstrap_overlaps(overlaps: Counts, resamples: int = 1000, seed: int = 0) -> Estimate:
    """As :func:`bootstrap_mean_iou`, of overlaps ``(N, 3, C)``."""
    parts = _image_weights(len(overlaps), resamples, seed)
    draws = np.concatenate([resampled_mean_iou(overlaps, weights) for weights in parts])
    return _estimate(mean_overlap(overlaps), draws)


def paired_overlaps(
    before: Counts, after: Counts, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """As :func:`paired_gain`, of overlaps ``(N, 3, C)``.

    Both are resampled by the same draws, so what makes an image hard cancels.
    """
    if before.shape != after.shape:
        msg = f"a paired gain needs the same images twice, got {before.shape} and {after.shape}"
        raise ValueError(msg)
    draws = [
        resampled_mean_iou(after, weights) - resampled_mean_iou(before, weights)
        for weights in _image_weights(len(before), resamples, seed)
    ]
    return _estimate(mean_overlap(after) - mean_overlap(before), np.concatenate(draws))


def resampled_mean_iou(overlaps: Counts, weights: Fractions) -> Fractions:
    """MIoU of every resample.

    Args:
        overlaps: intersections, unions and pixels in truth ``(N, 3, C)``.
        weights: how often each image was drawn, ``(R, N)``.

    Returns:
        ``(R,)``.
    """
    images, rows, labels = overlaps.shape
    flat = weights @ overlaps.reshape(images, rows * labels).astype(float)
    drawn = flat.reshape(len(weights), rows, labels)
    entering = in_mean(drawn)
    iou = np.where(entering, divide(drawn[:, 0], drawn[:, 1]), 0.0)
    return divide(iou.sum(axis=1), entering.sum(axis=1))


def _image_weights(images: int, resamples: int, seed: int) -> Iterator[Fractions]:
    """Multiplicity of each image in each draw of ``images`` with replacement, ``(r, N)`` a part.

    In parts, so that memory does not grow with images times resamples.
    """
    rng = np.random.default_rng(seed)
    even = np.full(images, 1 / images)
    for begin in range(0, resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, resamples - begin)
        yield rng.multinomial(images, even, size=size).astype(float)


def _estimate(value: float, draws: Fractions) -> Estimate:
    """Summarise the resampled values around the value itself."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(value, float(np.nanstd(draws, ddof=1)), (float(low), float(high)))
