"""From foreground probabilities to one label a pixel, by the seed's own background rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


@runtime_checkable
class BackgroundRule(Protocol):
    """What the background scores at each pixel."""

    def __call__(self, foreground: Float[Tensor, "k H W"]) -> Float[Tensor, "H W"]:
        """Return the background's score given all classes' probabilities."""


@dataclass(frozen=True)
class Threshold:
    """The background scores a constant.

    Attributes:
        value: a class must exceed it, in [0, 1].
    """

    value: float = 0.5

    def __post_init__(self) -> None:
        """Refuse a threshold that no probability, or every one, exceeds."""
        if not 0 <= self.value <= 1:
            message = f"background threshold is {self.value}; give a value from 0 to 1"
            raise ValueError(message)

    def __call__(self, foreground: Float[Tensor, "k H W"]) -> Float[Tensor, "H W"]:
        """Return the constant."""
        return foreground.new_full(foreground.shape[1:], self.value)


@dataclass(frozen=True)
class PowerBackground:
    """The background scores (1 - max S)^p.

    Attributes:
        power: p, positive; a larger one gives more foreground.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a power that does not fall with the foreground."""
        if self.power <= 0:
            message = f"background power is {self.power}; give a positive value"
            raise ValueError(message)

    def __call__(self, foreground: Float[Tensor, "k H W"]) -> Float[Tensor, "H W"]:
        """Return what the strongest class leaves over, to the power."""
        if not len(foreground):
            return foreground.new_ones(foreground.shape[1:])
        return (1 - foreground.amax(0)).pow(self.power)


def threshold_of(background: BackgroundRule) -> float | None:
    """Return from where on a mask alone counts as foreground; None for a rule that has no such S.

    Of a power rule it is the S that equals (1 - S)^p.
    """
    match background:
        case Threshold():
            return background.value
        case PowerBackground():
            low, high = 0.0, 1.0
            for _ in range(40):
                middle = (low + high) / 2
                below = middle < (1 - middle) ** background.power
                low, high = (middle, high) if below else (low, middle)
            return high  # exactly 0.5 for the power 1
        case _:
            return None


def compose_label(
    foreground: Float[Tensor, "k H W"], class_ids: Sequence[int], background: BackgroundRule
) -> UInt8[Tensor, "H W"]:
    """Return the best-scoring class of each pixel, 0 where none exceeds the background.

    Args:
        foreground: probabilities in [0, 1], one map a class; without maps all is background.
        class_ids: the label of each map, 1 to 254.
        background: the rule that scores the background.

    Raises:
        ValueError: the number of labels and maps differ, or a label cannot be one.
    """
    if len(class_ids) != len(foreground):
        message = f"{len(class_ids)} class_ids for {len(foreground)} maps; give one label a map"
        raise ValueError(message)
    if not all(1 <= label <= 254 for label in class_ids):
        message = f"class_ids are {tuple(class_ids)}; labels lie in 1 to 254"
        raise ValueError(message)
    labels = foreground.new_zeros(foreground.shape[1:], dtype=torch.uint8)
    best = background(foreground)
    # One class after the other: argmax over the few of them takes far longer on a CPU.
    for label, scores in zip(class_ids, foreground, strict=True):
        labels = labels.masked_fill(scores > best, label)  # where scores tie, the first wins
        best = torch.maximum(best, scores)
    return labels
