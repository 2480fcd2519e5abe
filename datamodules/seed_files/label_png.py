"""Label images: one label value a pixel, 0 the background, 255 ignored.

Decoded by index, never by colour: palettes of the field repeat colours.
"""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.errors import bad_item
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


def read(path: Path, options: ReadOptions) -> SeedMaps:
    """Reads a label image as one map per class: 1 on its pixels, 0 elsewhere.

    Args:
        path: a PNG of mode P, L or I;16.
        options: `label_offset` and `ignored_score`.

    Raises:
        BadItemError: another mode, or values below the offset.
    """
    values = read_label(path).astype(np.int32)
    ignored = values == IGNORE_INDEX
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
) -> NDArray[np.uint8]:
    """The label ``(H, W)`` of maps: the highest score, or 0 where none exceeds `background`."""
    if max(class_ids) >= IGNORE_INDEX:
        message = f"label values up to {max(class_ids)} do not fit an 8-bit label image"
        raise ValueError(message)
    ids = np.array((0, *class_ids), dtype=np.uint8)
    threshold = np.full((1, *scores.shape[1:]), background, dtype=scores.dtype)
    winner: NDArray[np.intp] = np.concatenate([threshold, scores]).argmax(axis=0)
    return ids[winner]


def write(stream: BinaryIO, label: NDArray[np.uint8]) -> None:
    """Writes label values ``(H, W)`` as a PNG with VOC's palette, so that viewers show colours."""
    image = Image.fromarray(label).convert("L")
    image.putpalette(palette())
    image.save(stream, format="PNG", optimize=True)
