"""What is minimised: cross entropy in the variants that use a refiner's probabilities.

A loss is called with logits ``(B, C, H, W)``, labels ``(B, H, W)`` with 255 ignored, and the soft
map ``(B, C, H, W)`` (each pixel's probabilities, background first) or None, and returns a scalar.
A batch in which no pixel counts gives 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.types import IGNORE_INDEX, ConfigurationError


@runtime_checkable
class SegmentationLoss(Protocol):
    """A loss of the training."""

    def __call__(self, logits: Tensor, mask: Tensor, soft: Tensor | None) -> Tensor:
        """Return the loss of a batch, a scalar."""


def weighted_cross_entropy(logits: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of -log q(label) over the pixels whose label is not 255.

    Args:
        logits: ``(B, C, H, W)``.
        mask: long ``(B, H, W)``.
        weights: non-negative ``(B, H, W)``; the loss does not depend on their scale.
    """
    losses = functional.cross_entropy(logits, mask, ignore_index=IGNORE_INDEX, reduction="none")
    return _weighted_mean(losses, weights * (mask != IGNORE_INDEX))


def soft_cross_entropy(logits: Tensor, soft: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of -Σ p log q over pixels.

    Args:
        logits: ``(B, C, H, W)``.
        soft: p, ``(B, C, H, W)``, summing to 1 where the weight is not 0.
        weights: non-negative ``(B, H, W)``.
    """
    losses = -(soft * functional.log_softmax(logits, dim=1)).sum(1)
    return _weighted_mean(losses, weights)


def label_confidence(mask: Tensor, soft: Tensor) -> Tensor:
    """Return the probability of each pixel's label ``(B, H, W)``; 0 where the label is 255."""
    known = mask != IGNORE_INDEX
    return soft.gather(1, (mask * known)[:, None])[:, 0] * known


@dataclass(frozen=True)
class CrossEntropy:
    """The mean of -log q(label); soft maps are not used."""

    def __call__(self, logits: Tensor, mask: Tensor, soft: Tensor | None) -> Tensor:
        """Return the loss of a batch."""
        return weighted_cross_entropy(logits, mask, torch.ones_like(mask, dtype=logits.dtype))


@dataclass(frozen=True)
class ConfidentCrossEntropy:
    """Cross entropy on the confident pixels only, as CLIP-ES trains (its 255 below 0.95).

    Attributes:
        least: confidence below which a pixel is ignored, in [0, 1].
    """

    least: float = 0.95

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if not 0 <= self.least <= 1:
            msg = f"loss: least is {self.least}; give a probability"
            raise ConfigurationError(msg)

    def __call__(self, logits: Tensor, mask: Tensor, soft: Tensor | None) -> Tensor:
        """Return the loss of a batch."""
        confidence = require_soft(soft, self).amax(1)
        return weighted_cross_entropy(logits, mask, (confidence >= self.least).to(logits.dtype))


@dataclass(frozen=True)
class WeightedCrossEntropy:
    """Cross entropy weighted at each pixel by the probability of its label, to a power.

    Attributes:
        power: 0 is plain cross entropy; larger ones trust uncertain pixels less.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a power that would prefer uncertain pixels."""
        if self.power < 0:
            msg = f"loss: power is {self.power}; give 0 or more"
            raise ConfigurationError(msg)

    def __call__(self, logits: Tensor, mask: Tensor, soft: Tensor | None) -> Tensor:
        """Return the loss of a batch."""
        confidence = label_confidence(mask, require_soft(soft, self))
        return weighted_cross_entropy(logits, mask, confidence.pow(self.power).to(logits.dtype))


@dataclass(frozen=True)
class SoftCrossEntropy:
    """Cross entropy against the refiner's probabilities, mixed with that against its labels.

    Attributes:
        soft_share: weight of the probabilities, the labels get the rest; in [0, 1].
    """

    soft_share: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 <= self.soft_share <= 1:
            msg = f"loss: soft_share is {self.soft_share}; give a number from 0 to 1"
            raise ConfigurationError(msg)

    def __call__(self, logits: Tensor, mask: Tensor, soft: Tensor | None) -> Tensor:
        """Return the loss of a batch."""
        counted = (mask != IGNORE_INDEX).to(logits.dtype)
        target = require_soft(soft, self).to(logits.dtype)
        against_soft = soft_cross_entropy(logits, target, counted)
        against_labels = weighted_cross_entropy(logits, mask, counted)
        return self.soft_share * against_soft + (1 - self.soft_share) * against_labels


def soft_maps(batch: Mapping[str, Any]) -> Tensor | None:
    """Return the soft map of a training batch ``(B, C, H, W)``; None if it has none.

    Raises:
        ConfigurationError: it is as the loader's workers send it, planes of a few labels.
    """
    if "soft_planes" in batch:
        msg = (
            "batch: it has soft_planes in place of soft, which the DataModule's "
            "transfer_batch_to_device makes of them: give the Trainer the DataModule itself, not "
            "its loader, or call that"
        )
        raise ConfigurationError(msg)
    return batch.get("soft")


def require_soft(soft: Tensor | None, loss: object) -> Tensor:
    """Return the soft map.

    Raises:
        ConfigurationError: there is none, but the loss needs it.
    """
    if soft is None:
        msg = f"loss: {type(loss).__name__} needs soft maps; set data.soft to true"
        raise ConfigurationError(msg)
    return soft


def _weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum()
    # An empty batch keeps its place in the graph, so that every process has gradients to sync.
    return (losses * weights).sum() / torch.where(total > 0, total, torch.ones_like(total))
