"""Label images: one label value a pixel, 0 the background, 255 ignored.

Decoded by index, never by colour: palettes of the field repeat colours. Data sets of more than 254
classes (PASCAL Context's 459) use 16 bits, where 65535 is ignored and 255 is a class.
"""

from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.errors import bad_item
from datamodules.files import File
from datamodules.images import read_label
from datamodules.seed_files.maps import ReadOptions, SeedMaps
from g4seg_pl.types import IGNORE_INDEX


def palette() -> list[int]:
    """The PASCAL VOC palette as 768 numbers: the bits of an index dealt out over R, G, B."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.int64)
    for step in range(8):
        for channel in range(3):
            bit = (index >> (3 * step + channel)) & 1
            colours[:, channel] |= bit << (7 - step)
    return [int(value) for value in colours.reshape(-1)]


IGNORE_16 = 65535


def read(path: File, classes: int, options: ReadOptions) -> SeedMaps:
    """Reads a label image as one map per class: 1 on its pixels, 0 elsewhere.

    Args:
        path: a PNG of mode P, L or I;16.
        classes: number of foreground classes; from 255 on, 255 is one of them in 16-bit images.
        options: `label_offset` and `ignored_score`.

    Raises:
        BadItemError: another mode, or values below the offset.
    """
    raw = read_label(path)
    values = raw.astype(np.int32)
    wide = raw.dtype == np.uint16
    ignored = values == (IGNORE_16 if wide and classes >= IGNORE_INDEX else IGNORE_INDEX)
    values -= options.label_offset
    values[ignored] = 0
    if (values < 0).any():
        problem = f"label {int(values.min()) + options.label_offset} is below the offset"
        raise bad_item(path, problem, f"Check label_offset={options.label_offset}")
    ids = [int(value) for value in np.unique(values) if value != 0]
    maps = np.empty((len(ids), *values.shape), dtype=np.float32)
    for index, class_id in enumerate(ids):
        maps[index] = values == class_id
    maps[:, ignored] = options.ignored_score
    return SeedMaps("png", tuple(ids), maps)


def label_from_scores(
    class_ids: tuple[int, ...], scores: NDArray[np.floating[Any]], background: float
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The label ``(H, W)`` of maps: the highest score, or 0 where none exceeds `background`.

    It has 16 bits where a label value does not fit 8 bits beside 255, the ignored one.
    """
    fits = max(class_ids, default=0) < IGNORE_INDEX
    ids: NDArray[Any] = np.array((0, *class_ids), dtype=np.uint8 if fits else np.uint16)
    threshold = np.full((1, *scores.shape[1:]), background, dtype=scores.dtype)
    winner: NDArray[np.intp] = np.concatenate([threshold, scores]).argmax(axis=0)
    return ids[winner]


def write(stream: BinaryIO, label: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
    """Writes label values ``(H, W)`` as a PNG with VOC's palette, so that viewers show colours.

    Labels of 16 bits become a 16-bit grey PNG: palettes end at 255.
    """
    image = Image.fromarray(label)
    if label.dtype == np.uint16:
        image.save(stream, format="PNG")
        return
    image = image.convert("L")
    image.putpalette(palette())
    image.save(stream, format="PNG", optimize=True)
