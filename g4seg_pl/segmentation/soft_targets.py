"""From a refiner's foreground maps to one distribution over labels at each pixel.

The label file is the refiner's decision by a background rule; the distribution is made so that its
most probable label is that decision, whichever of the rules made it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from g4seg_pl.core.background import BackgroundRule, PowerBackground, Threshold
from g4seg_pl.types import ConfigurationError

SMALLEST = 1e-6
NAMED_BACKGROUND = ("MaskClip", "Sclip")
"""Makers of seeds whose label maps no background rule made, where background words were given."""
RULES: dict[str, type[PowerBackground | Threshold]] = {
    f"{rule.__module__}.{rule.__qualname__}": rule for rule in (PowerBackground, Threshold)
}


@dataclass(frozen=True)
class SoftReading:
    """How the foreground maps of a folder are to be understood.

    Attributes:
        marginals: they are a distribution less its background (a dense CRF's or a softmax's), so
            the background is what is missing to 1; otherwise each map is a probability of its own.
        background: the rule by which the labels were made; used where maps are not marginals.
    """

    marginals: bool = False
    background: BackgroundRule = field(default_factory=Threshold)


def reading_of(record: dict[str, Any], remedy: str = "set data.soft to false") -> SoftReading:
    """Find out from a folder's run.json how its soft maps are to be understood.

    Args:
        record: the content of run.json.
        remedy: what to do if that cannot be found out.

    Raises:
        ConfigurationError: the background rule is not one of ours, or is not recorded, or the
            background's own scores would be needed.
    """
    config = record.get("config", {})
    changed_by = [str(entry.get("class_path", "")) for entry in config.get("changed_by", [])]
    arguments = config.get("model", {}).get("init_args", {})
    if any(name.endswith(".DenseCRF") for name in changed_by) or arguments.get("marginals"):
        return SoftReading(marginals=True)
    maker = str(config.get("model", {}).get("class_path", "")).rpartition(".")[2]
    if maker in NAMED_BACKGROUND and arguments.get("background_words"):
        msg = (
            f"soft: {maker} scored the background by names whose maps are not in the folder, so "
            f"its soft maps cannot be read: {remedy}"
        )
        raise ConfigurationError(msg)
    rule = arguments.get("background") or {}
    path = rule.get("class_path", "")
    if path not in RULES:
        msg = (
            f"soft: no background rule that is known here is recorded (got {path or 'none'}): "
            f"soft maps cannot be read without it, so {remedy}"
        )
        raise ConfigurationError(msg)
    return SoftReading(background=RULES[path](**rule.get("init_args", {})))


def class_distribution(foreground: Tensor, reading: SoftReading) -> Tensor:
    """Return the probability of background and classes at each pixel.

    Args:
        foreground: ``(K, H, W)`` in [0, 1].
        reading: how the maps are to be understood.

    Returns:
        float32 ``(K + 1, H, W)``, background first, summing to 1.
    """
    foreground = foreground.float()
    if not len(foreground):
        return torch.ones(1, *foreground.shape[1:])
    if reading.marginals:
        background = (1 - foreground.sum(0)).clamp(min=0)
    elif isinstance(reading.background, Threshold):
        foreground = _against(foreground, reading.background.value)
        background = 1 - foreground.amax(0)
    else:
        background = reading.background(foreground)
    scores = torch.cat([background[None], foreground])
    return scores / scores.sum(0).clamp(min=SMALLEST)


def place_labels(planes: Tensor, labels: Sequence[Sequence[int]], num_labels: int) -> Tensor:
    """Put the probabilities of the images' own labels among those of all labels.

    Args:
        planes: ``(B, K, H, W)``; an image of fewer labels leaves its last planes unused.
        labels: label values of each image's planes, K or fewer an image.
        num_labels: number of labels, background included.

    Returns:
        ``(B, num_labels, H, W)``, zero for absent labels.
    """
    full = planes.new_zeros(len(planes), num_labels, *planes.shape[2:])
    for target, source, values in zip(full, planes, labels, strict=True):
        target[list(values)] = source[: len(values)]
    return full


def _against(foreground: Tensor, threshold: float) -> Tensor:
    """Shift probabilities by their odds, so that the threshold falls on one half.

    p' = p (1 - t) / (p (1 - t) + (1 - p) t); with t = 1/2 nothing changes.
    """
    limit = min(max(threshold, SMALLEST), 1 - SMALLEST)
    present = foreground * (1 - limit)
    return present / (present + (1 - foreground) * limit)
