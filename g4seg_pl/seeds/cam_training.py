"""Pictures for training the classifier behind class activation maps."""

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from g4seg_pl.features.base import normalise
from g4seg_pl.seeds.base import resize_picture
from g4seg_pl.seeds.groupvit import IMAGENET_MEAN, IMAGENET_STD
from g4seg_pl.types import Sample


def training_picture(
    sample: Sample, crop: int, longer_side: tuple[int, int]
) -> Float[Tensor, "1 3 c c"]:
    """Return the image resized, mirrored and cropped at random, normalised, zeros around it.

    Args:
        sample: the image.
        crop: side of the result, in pixels.
        longer_side: the range its longer side is drawn from.
    """
    longer = int(torch.randint(longer_side[0], longer_side[1] + 1, ()))
    height, width = sample.image.shape[1:]
    scale = longer / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    picture = resize_picture(sample.image, size, Image.Resampling.BICUBIC)
    picture = normalise(picture, IMAGENET_MEAN, IMAGENET_STD)
    if torch.rand(()) < 0.5:
        picture = picture.flip(3)
    rows, from_top = _random_window(size[0], crop)
    columns, from_left = _random_window(size[1], crop)
    part = picture[:, :, rows, columns]
    right, bottom = crop - part.shape[3] - from_left, crop - part.shape[2] - from_top
    return functional.pad(part, (from_left, right, from_top, bottom))


def _random_window(length: int, crop: int) -> tuple[slice, int]:
    """What of a side is taken, and where in the crop it goes."""
    if length >= crop:
        start = int(torch.randint(0, length - crop + 1, ()))
        return slice(start, start + crop), 0
    return slice(0, length), int(torch.randint(0, crop - length + 1, ()))
