"""The VOC palette, so that a label file looks like one in every viewer."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LABELS = 256


def voc_palette() -> list[int]:
    """Red, green and blue of labels 0 to 255 in a row (768 numbers), as VOC's own files have them.

    The label's bits are dealt out to the three channels in turn, most significant bits first.
    """
    palette = np.zeros((LABELS, 3), np.uint8)
    labels = np.arange(LABELS)
    for bit in range(8):
        palette[:, bit % 3] |= (((labels >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    return [int(value) for value in palette.ravel()]


def label_image(labels: NDArray[np.uint8]) -> Image.Image:
    """An indexed (P-mode) image of label values.

    Args:
        labels: uint8 ``(H, W)``; the label is the palette index.
    """
    image = Image.fromarray(np.ascontiguousarray(labels))
    image.putpalette(voc_palette())
    return image
