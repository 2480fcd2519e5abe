"""What crosses the borders between data, refiner and files: frozen dataclasses and the errors."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

IGNORE_INDEX = 255
RANGE_TOLERANCE = 1e-3
"""Scores may leave [0, 1] by this much (float16 and interpolation)."""


class G4SegError(Exception):
    """Base of every error this package raises on purpose."""


class BadItemError(G4SegError):
    """One item (image, seed, label) cannot be used; the message names file, field and remedy."""


class ConfigurationError(G4SegError, ValueError):
    """The run as configured cannot work; raised before any model is loaded."""


class UsageError(ConfigurationError):
    """Arguments of a command cannot be parsed; its exit status is 2, as everywhere."""


def check_counts(least: int, **given: int) -> None:
    """Refuse numbers below the least that can work.

    Raises:
        ConfigurationError: naming the argument.
    """
    for name, value in given.items():
        if value < least:
            message = f"{name} is {value}: give {least} or more"
            raise ConfigurationError(message)


def check_working_size(size: int | None) -> None:
    """Refuse a working square that autoencoders cannot halve and double again.

    Raises:
        ConfigurationError: it is no multiple of 8 pixels.
    """
    if size is not None and (size < 8 or size % 8):
        message = f"working_size is {size}: give a multiple of 8 pixels, or leave it out"
        raise ConfigurationError(message)


def check_class_count(argument: str, count: int) -> None:
    """Refuse more classes than label images of 8 bits can hold beside the ignored value.

    Args:
        argument: what named the classes, for errors.
        count: how many, the background aside.

    Raises:
        ConfigurationError: label values would begin again at 0 behind 255.
    """
    if count >= IGNORE_INDEX:
        message = (
            f"{argument}: {count} classes, but masks are label images of 8 bits, which hold "
            f"{IGNORE_INDEX - 1} ({IGNORE_INDEX} is ignored); give one of fewer classes"
        )
        raise ConfigurationError(message)


@dataclass(frozen=True)
class Seed:
    """A coarse mask per class of one image.

    Attributes:
        class_ids: label values as in the ground truth, 1-based (0 is background), one per map.
        scores: foreground probability of each class, float32 ``(K, H, W)`` in [0, 1].
    """

    class_ids: tuple[int, ...]
    scores: Tensor


@dataclass(frozen=True)
class Sample:
    """One image with its coarse masks, at native size.

    Attributes:
        image_id: the image's own name without suffix; also the name of its mask file.
        image: uint8 ``(3, H, W)``, RGB.
        seed: coarse masks of the same height and width.
        class_names: the name put into the prompt for each class of the seed.
        truth: uint8 ``(H, W)`` label values, 255 ignored; None where there is no ground truth.
        image_path: the file the image was read from, if any.
    """

    image_id: str
    image: Tensor
    seed: Seed
    class_names: tuple[str, ...]
    truth: Tensor | None = None
    image_path: Path | None = None


def check_sample(sample: Sample) -> None:
    """Refuse an image or masks that would be taken for something else; nothing is copied.

    Raises:
        BadItemError: the image is not uint8 ``(3, H, W)``, the maps are not of its size or not
            within 0 and 1, or there are not as many as label values and names, which are texts.
    """
    image, scores, ids = sample.image, sample.seed.scores, sample.seed.class_ids
    name, size = sample.image_id, tuple(sample.image.shape[1:])
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        message = (
            f"{name}: image is {image.dtype} of shape {tuple(image.shape)}; give uint8 of 0 to "
            "255 and shape (3, H, W)"
        )
        raise BadItemError(message)
    if scores.ndim != 3 or tuple(scores.shape[1:]) != size:
        message = (
            f"{name}: seed.scores has shape {tuple(scores.shape)}; give (K, *{size}), as image"
        )
        raise BadItemError(message)
    if not len(scores) == len(ids) == len(sample.class_names):
        message = (
            f"{name}: {len(scores)} maps in seed.scores, {len(ids)} seed.class_ids and "
            f"{len(sample.class_names)} class_names; give one of each for every class"
        )
        raise BadItemError(message)
    if others := [each for each in sample.class_names if not isinstance(each, str)]:
        kind = type(others[0]).__name__
        message = f"{name}: class name {others[0]!r} is of type {kind}; give a text for the prompt"
        raise BadItemError(message)
    low, high = (float(end) for end in scores.aminmax()) if scores.numel() else (0.0, 1.0)
    # Not-a-number compares false, so it is caught here too.
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        message = f"{name}: seed.scores go from {low:.3g} to {high:.3g}; rescale them to 0 to 1"
        raise BadItemError(message)


@dataclass(frozen=True)
class FailedSample:
    """An item that could not be read or refined.

    Attributes:
        image_id: the id asked for.
        error: file, field and remedy in one sentence.
    """

    image_id: str
    error: str


@dataclass(frozen=True)
class RefinedMask:
    """The refined masks of one image, at native size.

    Attributes:
        image_id: as in the sample.
        class_ids: as in the seed.
        foreground: refined foreground probabilities, float32 ``(K, H, W)`` in [0, 1], on the CPU.
        label: uint8 ``(H, W)`` label values by the run's background rule.
        confidence: float32 ``(K, H, W)`` in [0, 1], where a step measured it.
        score: float32 ``(K,)``, how much better than an empty mask each mask explains the image,
            where a step measured it; higher is better.
        score_error: float32 ``(K,)``, standard error of ``score``; not finite for a single draw.
        pixel_weights: float32 ``(K, H, W)`` in [0, 1], how surely the mask is right at each
            pixel, where a step measured it.
    """

    image_id: str
    class_ids: tuple[int, ...]
    foreground: Tensor
    label: Tensor
    confidence: Tensor | None = None
    score: Tensor | None = None
    score_error: Tensor | None = None
    pixel_weights: Tensor | None = None
