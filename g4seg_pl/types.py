"""What crosses the borders between data, refiner and files: frozen dataclasses and the errors."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

IGNORE_INDEX = 255


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
