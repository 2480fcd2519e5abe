"""Pictures for training the classifier behind class activation maps."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from g4seg_pl.features.base import normalise
from g4seg_pl.seeds.base import resize_picture
from g4seg_pl.seeds.groupvit import IMAGENET_MEAN, IMAGENET_STD


def training_pictures(
    images: Sequence[UInt8[Tensor, "3 _ _"]], crop: int, longer_side: tuple[int, int]
) -> Float[Tensor, "b 3 c c"]:
    """Return images resized, mirrored and cropped at random, normalised, zeros around them.

    Args:
        images: RGB, on any device, each of its own size.
        crop: side of the result, in pixels.
        longer_side: the range an image's longer side is drawn from.
    """
    # All draws before all work: threads would draw in whatever order they come.
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    placements = [_draw(size, crop, longer_side) for size in sizes]
    with ThreadPoolExecutor() as threads:  # Pillow works outside the interpreter's lock
        pictures = threads.map(_placed, images, placements)
        return torch.cat(list(pictures))


@dataclass(frozen=True)
class _Placement:
    """How an image gets into its crop.

    Attributes:
        size: height and width it is resized to.
        mirrored: whether left and right change places.
        rows: that are taken, and columns.
        corner: of the crop where they go, from the top and from the left.
        crop: side of the crop.
    """

    size: tuple[int, int]
    mirrored: bool
    rows: slice
    columns: slice
    corner: tuple[int, int]
    crop: int


def _draw(size: tuple[int, int], crop: int, longer_side: tuple[int, int]) -> _Placement:
    """Draw a placement for an image of this height and width."""
    longer = int(torch.randint(longer_side[0], longer_side[1] + 1, ()))
    scale = longer / max(size)
    resized = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    mirrored = bool(torch.rand(()) < 0.5)
    rows, from_top = _random_window(resized[0], crop)
    columns, from_left = _random_window(resized[1], crop)
    return _Placement(resized, mirrored, rows, columns, (from_top, from_left), crop)


def _placed(image: Tensor, placement: _Placement) -> Tensor:
    """The crop ``(1, 3, c, c)``."""
    picture = resize_picture(image, placement.size, Image.Resampling.BICUBIC)
    picture = normalise(picture, IMAGENET_MEAN, IMAGENET_STD)
    if placement.mirrored:
        picture = picture.flip(3)
    part = picture[:, :, placement.rows, placement.columns]
    from_top, from_left = placement.corner
    right = placement.crop - part.shape[3] - from_left
    bottom = placement.crop - part.shape[2] - from_top
    return functional.pad(part, (from_left, right, from_top, bottom))


def _random_window(length: int, crop: int) -> tuple[slice, int]:
    """What of a side is taken, and where in the crop it goes."""
    if length >= crop:
        start = int(torch.randint(0, length - crop + 1, ()))
        return slice(start, start + crop), 0
    return slice(0, length), int(torch.randint(0, crop - length + 1, ()))
