"""Random scale, crop, flip and colour, the same geometry for picture, mask and soft map."""

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g4seg_pl.segmentation.normalisation import MEAN
from g4seg_pl.types import IGNORE_INDEX, ConfigurationError

UNSCALED = (1.0, 1.0)


@dataclass(frozen=True)
class Augmentation:
    """What happens at random to a training picture, in this order.

    Attributes:
        crop_size: side of the square crop, pixels; smaller pictures are padded, their masks by 255.
        scale: least and greatest factor on the picture's sides, drawn uniformly.
        flip: probability of a mirror image, in [0, 1].
        colour: how far brightness, contrast and saturation may change, as a fraction; the hue
            changes by up to a quarter of it. 0 leaves colours alone.
    """

    crop_size: int = 321
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    colour: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        low, high = self.scale
        if self.crop_size < 1 or not 0 < low <= high:
            msg = (
                f"augmentation: crop_size is {self.crop_size}, scale {self.scale}: give a positive "
                "size, and a positive factor with one that is no less"
            )
            raise ConfigurationError(msg)
        if not 0 <= self.flip <= 1 or not 0 <= self.colour < 1:
            msg = (
                f"augmentation: flip is {self.flip}, colour {self.colour}: give a probability, and "
                "a fraction below 1"
            )
            raise ConfigurationError(msg)


class Augmenter:
    """Applies an :class:`Augmentation`.

    Args:
        settings: what to do.
    """

    def __init__(self, settings: Augmentation) -> None:
        self.settings = settings
        self._transforms = _composed(settings)

    def __call__(
        self,
        image: NDArray[np.uint8],
        mask: NDArray[np.uint8],
        soft: NDArray[np.float32] | None = None,
        seed: int | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Augment one picture.

        Args:
            image: uint8 ``(H, W, 3)``, RGB.
            mask: label values ``(H, W)``, 255 ignored.
            soft: class probabilities ``(H, W, K)``, or None.
            seed: decides every draw; None draws anew each time.

        Returns:
            ``image``, ``mask`` and, where given, ``soft``, all of side ``crop_size``. Where the
            picture was padded, the mask is 255 and the soft map 0.
        """
        # One generator for all transforms: seeding each by the same number would tie the draws
        # of scale, place and flip to each other.
        self._transforms.set_random_state(np.random.default_rng(seed), random.Random(seed))
        arrays = {"image": image, "mask": mask} | ({} if soft is None else {"soft": soft})
        result: dict[str, NDArray[Any]] = dict(self._transforms(**arrays))
        if soft is not None:
            # Padding is marked by 255 in the soft map, as in the mask.
            result["soft"] = np.where(result["soft"] > 1, 0, result["soft"])
        return result


def _composed(settings: Augmentation) -> Any:
    """The transforms in order; those that would do nothing are left out."""
    # Without this, importing albumentations asks a server for its latest version. It is imported
    # here because it takes a second that no other command should wait for.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations
    import cv2

    low, high = settings.scale
    side, colour = settings.crop_size, settings.colour
    pad_colour = tuple(round(255 * mean) for mean in MEAN)
    padding = {"border_mode": cv2.BORDER_CONSTANT, "fill": pad_colour, "fill_mask": IGNORE_INDEX}
    steps: list[Any] = []
    if settings.scale != UNSCALED:
        steps.append(albumentations.RandomScale(scale_limit=(low - 1, high - 1), p=1))
    steps.append(albumentations.PadIfNeeded(side, side, **padding))
    steps.append(albumentations.RandomCrop(side, side))
    if settings.flip:
        steps.append(albumentations.HorizontalFlip(p=settings.flip))
    if colour:
        bounds = (1 - colour, 1 + colour)
        hue = (-colour / 4, colour / 4)
        steps.append(albumentations.ColorJitter(bounds, bounds, bounds, hue, p=1))
    return albumentations.Compose(
        steps,
        additional_targets={"soft": "mask"},
        # cv2's plain nearest neighbour is half a pixel off the picture's own resize.
        mask_interpolation=cv2.INTER_NEAREST_EXACT,
    )
