"""A VOC tree of a few small images with CLIP-ES seeds, as the real ones lie on disk."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from g4seg_pl.callbacks.palette import label_image

IDS = ("2007_000032", "2007_000039", "2007_000063")
SIZES = ((40, 52), (64, 48), (33, 70))
CLASSES = ((12,), (15, 12), (9,))
"""Label values of each image: dog; person and dog; chair."""


def write_voc(root: Path, ids: Sequence[str] = IDS, split: str = "train") -> Path:
    """Write ``root/VOCdevkit/VOC2012`` and ``root/cam_out``.

    Args:
        root: an empty folder.
        ids: of the images; sizes and classes repeat after three.
        split: name of the list.

    Returns:
        the VOC2012 folder.
    """
    voc = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    (root / "cam_out").mkdir()
    for index, image_id in enumerate(ids):
        _write_item(voc, root / "cam_out", image_id, index)
    lines = "".join(f"{image_id}\n" for image_id in ids)
    (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(lines)
    return voc


def _write_item(voc: Path, seeds: Path, image_id: str, index: int) -> None:
    """One image, its truth (with a 255 strip) and its seed."""
    rng = np.random.default_rng(index)
    (height, width), classes = SIZES[index % 3], CLASSES[index % 3]
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(voc / "JPEGImages" / f"{image_id}.jpg")
    truth = np.zeros((height, width), np.uint8)
    maps = np.zeros((len(classes), height, width), np.float16)
    for place, label in enumerate(classes):
        columns = slice(4 + 20 * place, 18 + 20 * place)
        truth[8:28, columns] = label
        maps[place, 6:24, columns] = 0.9
        maps[place, 24:30, columns] = 0.45
    truth[28:30] = 255
    label_image(truth).save(voc / "SegmentationClass" / f"{image_id}.png")
    content = {"keys": np.array(classes) - 1, "attn_highres": maps}
    np.save(seeds / f"{image_id}.npy", content, allow_pickle=True)
