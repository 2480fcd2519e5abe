"""Pictures of masks: pure functions from arrays to PIL images."""

import math
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from g4seg_pl.callbacks.palette import voc_palette

Bytes = NDArray[np.uint8]
GAIN, LOSS, OTHER = (60, 200, 90), (220, 60, 60), (230, 190, 60)
VISIBLE = (255, 130, 0)  # in place of the palette's greys, which a grey picture would swallow


def overlay(image: Bytes, label: Bytes, opacity: float = 0.6) -> Image.Image:
    """A label map over its grey picture.

    Args:
        image: uint8 ``(H, W, 3)``.
        label: uint8 ``(H, W)``; 0 stays clear.
        opacity: of the labels, in [0, 1].
    """
    palette = np.asarray(voc_palette(), np.float32).reshape(-1, 3)
    palette[np.ptp(palette, axis=1) == 0] = VISIBLE
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


def fitted_size(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of a picture of ``(H, W)`` pixels whose longer side becomes ``side``."""
    scale = side / max(shape)
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def fit(picture: Image.Image, size: tuple[int, int], *, smooth: bool = False) -> Image.Image:
    """A picture at a width and height.

    Args:
        picture: of any mode.
        size: width and height.
        smooth: interpolate, for photographs; otherwise pixels stay squares, for label maps.
    """
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return picture.convert("RGB").resize(size, how)


def marks(
    picture: Image.Image,
    places: Sequence[tuple[float, float]],
    rings: Sequence[tuple[int, int, int]],
    shape: Literal["circle", "star"],
) -> Image.Image:
    """Numbered marks on a copy of a picture; equal numbers have equal colours on every picture.

    Args:
        picture: at the size it is shown.
        places: row and column of each mark as shares of height and width, in [0, 1].
        rings: colour of each mark's outline.
        shape: of the marks.
    """
    marked = picture.convert("RGB")
    draw = ImageDraw.Draw(marked)
    radius = max(5.0, max(picture.size) / 30)
    for index, ((row, column), ring) in enumerate(zip(places, rings, strict=True)):
        x, y = column * picture.size[0], row * picture.size[1]
        red, green, blue = hsv_to_rgb(index / max(1, len(places)), 0.55, 1.0)
        fill = (round(255 * red), round(255 * green), round(255 * blue))
        if shape == "circle":
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, fill=fill, outline=ring, width=2)
        else:
            draw.polygon(_star(x, y, 1.5 * radius), fill=fill, outline=ring, width=1)
        draw.text((x, y), str(index + 1), fill="black", anchor="mm", font_size=1.4 * radius)
    return marked


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    reach = [radius if corner % 2 == 0 else 0.5 * radius for corner in range(10)]
    turns = [math.pi * (corner / 5 - 0.5) for corner in range(10)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(reach, turns, strict=True)]


def grid(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    side: int = 160,
    labels: Sequence[str] = (),
) -> Image.Image:
    """Rows of pictures under column titles.

    Args:
        rows: the pictures, each row as long as ``titles``.
        titles: one a column; those that are too long are set smaller, then cut.
        side: longer side of each picture on the sheet, pixels.
        labels: one a row, written above it; none leaves no room for them.
    """
    gap, head, strip = 4, 20, 18 if labels else 0
    sizes = [fitted_size((row[0].height, row[0].width), side) for row in rows]
    width = len(titles) * (side + gap) - gap
    heights = [strip + size[1] + gap for size in sizes]
    sheet = Image.new("RGB", (width, head + sum(heights) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        _write(draw, (column * (side + gap) + 2, 3), title, side - 2)
    top = head
    for index, row in enumerate(rows):
        if labels:
            _write(draw, (2, top + 2), labels[index], width - 2)
        for column, picture in enumerate(row):
            shown = picture if picture.size == sizes[index] else fit(picture, sizes[index])
            sheet.paste(shown.convert("RGB"), (column * (side + gap), top + strip))
        top += heights[index]
    return sheet


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    size = 13
    while size > 7 and draw.textlength(text, font_size=size) > width:
        size -= 1
    while len(text) > 1 and draw.textlength(text, font_size=size) > width:
        text = text.removesuffix("…")[:-1] + "…"
    draw.text(place, text, fill="black", font_size=size)
