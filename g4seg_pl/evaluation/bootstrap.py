"""Standard errors by resampling images: of a score, and of the gain between two runs."""

from dataclasses import dataclass

import numpy as np

from g4seg_pl.evaluation.confusion import (
    Counts,
    Fractions,
    divide,
    intersection_and_union,
    mean_iou,
)


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
    draws = resampled_mean_iou(counts, _image_weights(len(counts), resamples, seed))
    return _estimate(mean_iou(counts), draws)


def paired_gain(before: Counts, after: Counts, resamples: int = 1000, seed: int = 0) -> Estimate:
    """The gain in mIoU from ``before`` to ``after`` on the same images, with its standard error.

    Both are resampled by the same draws, so what makes an image hard cancels.

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
    if before.shape != after.shape:
        msg = f"a paired gain needs the same images twice, got {before.shape} and {after.shape}"
        raise ValueError(msg)
    weights = _image_weights(len(before), resamples, seed)
    draws = resampled_mean_iou(after, weights) - resampled_mean_iou(before, weights)
    return _estimate(mean_iou(after) - mean_iou(before), draws)


def resampled_mean_iou(counts: Counts, weights: Fractions) -> Fractions:
    """MIoU of every resample.

    Args:
        counts: confusion matrices ``(N, C, C)``.
        weights: how often each image was drawn, ``(R, N)``.

    Returns:
        ``(R,)``.
    """
    intersection, union = intersection_and_union(counts)
    iou = divide(weights @ intersection.astype(float), weights @ union.astype(float))
    present = ~np.isnan(iou)
    return divide(np.where(present, iou, 0.0).sum(axis=1), present.sum(axis=1))


def _image_weights(images: int, resamples: int, seed: int) -> Fractions:
    """Multiplicity of each image in each draw of ``images`` with replacement, ``(R, N)``."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(float)


def _estimate(value: float, draws: Fractions) -> Estimate:
    """Summarise the resampled values around the value itself."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(value, float(np.nanstd(draws, ddof=1)), (float(low), float(high)))
