"""Pictures of masks: pure functions from arrays to PIL images."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from g4seg_pl.callbacks.palette import voc_palette

Bytes = NDArray[np.uint8]
GAIN, LOSS, OTHER = (60, 200, 90), (220, 60, 60), (230, 190, 60)


def overlay(image: Bytes, label: Bytes, opacity: float = 0.6) -> Image.Image:
    """A label map over its grey picture.

    Args:
        image: uint8 ``(H, W, 3)``.
        label: uint8 ``(H, W)``; 0 stays clear.
        opacity: of the labels, in [0, 1].
    """
    palette = np.asarray(voc_palette(), np.float32).reshape(-1, 3)
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    mixed = np.where((label > 0)[..., None], (1 - opacity) * grey + opacity * palette[label], grey)
    return Image.fromarray(mixed.round().astype(np.uint8))


def heat(soft: NDArray[np.float32]) -> Image.Image:
    """A soft map ``(H, W)`` in [0, 1], from dark blue through white to dark red."""
    x = np.clip(soft, 0, 1)[..., None]
    low, middle, high = (
        np.asarray(c, np.float32) for c in ((20, 40, 90), (245, 245, 240), (140, 20, 30))
    )
    colour = np.where(x < 0.5, low + (middle - low) * 2 * x, middle + (high - middle) * (2 * x - 1))
    return Image.fromarray(colour.round().astype(np.uint8))


def change(before: Bytes, after: Bytes, truth: Bytes) -> Image.Image:
    """What a refinement changed: green to the truth, red away from it, yellow wrong to wrong.

    Args:
        before: uint8 labels ``(H, W)``.
        after: uint8 labels ``(H, W)``.
        truth: uint8 labels ``(H, W)``; ignored pixels (255) stay black.
    """
    picture = np.zeros((*truth.shape, 3), np.uint8)
    changed = (before != after) & (truth != 255)
    picture[changed] = OTHER
    picture[changed & (after == truth)] = GAIN
    picture[changed & (before == truth)] = LOSS
    outline = np.zeros(truth.shape, bool)
    outline[:, 1:] |= truth[:, 1:] != truth[:, :-1]
    outline[1:] |= truth[1:] != truth[:-1]
    picture[outline & ~changed] = 90
    return Image.fromarray(picture)


def grid(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], side: int = 160
) -> Image.Image:
    """Rows of pictures under column titles.

    Args:
        rows: the pictures, each row as long as ``titles``.
        titles: one a column.
        side: of each picture on the sheet, pixels.
    """
    gap, head = 4, 18
    size = (len(titles) * (side + gap) - gap, head + len(rows) * (side + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * (side + gap) + 2, 3), title, fill="black")
    for index, row in enumerate(rows):
        for column, picture in enumerate(row):
            enlarged = picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (column * (side + gap), head + index * (side + gap)))
    return sheet
