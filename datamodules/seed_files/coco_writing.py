"""Writing COCO's JSON: one data-set file for all images, masks as compressed run lengths.

Run lengths are hard masks, so that the label image of the scores is what is written: each pixel
belongs to its best class, or to none where no score exceeds the background. Annotations carry no
score and are read back as 1 inside, 0 outside.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.classes import ClassList, read_class_list
from datamodules.seed_files.coco import mask_tools
from datamodules.seed_files.label_png import label_from_scores
from datamodules.seed_files.maps import COCO_CATEGORY_IDS
from datamodules.seed_files.writing import write_atomically


def category_ids(classes: ClassList) -> tuple[int, ...]:
    """The category id of each class: COCO's own for COCO's eighty things, else label values."""
    if classes.names == read_class_list("coco").names:
        return COCO_CATEGORY_IDS
    return tuple(range(1, len(classes) + 1))


def image_numbers(names: list[str]) -> dict[str, int]:
    """A number for each image: the digits its name ends with where these tell images apart.

    COCO's own names (`000000000009`, `COCO_train2014_000000000009`) keep COCO's numbers; others
    are counted from 1.
    """
    digits = [name.rpartition("_")[2] for name in names]
    if all(each.isdecimal() for each in digits) and len({*map(int, digits)}) == len(names):
        return {name: int(each) for name, each in zip(names, digits, strict=True)}
    return {name: number for number, name in enumerate(names, start=1)}


class CocoWriter:
    """Collects the masks of all images; `close` writes them into one file, whole or not at all.

    Args:
        path: the JSON file.
        classes: the class list, for the categories.
        background: score that a class must exceed to own a pixel.
        names: every image that may be written, for their numbers.

    Raises:
        ConfigurationError: pycocotools is not installed.
    """

    def __init__(self, path: Path, classes: ClassList, background: float, names: list[str]) -> None:
        self._tools = mask_tools()
        self._path, self._classes, self._background = path, classes, background
        self._numbers, self._ids = image_numbers(names), category_ids(classes)
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def write(
        self, name: str, class_ids: tuple[int, ...], scores: NDArray[np.floating[Any]]
    ) -> None:
        """Adds one image.

        Args:
            name: the image's id; it must be one of `names`.
            class_ids: label values, 1-based.
            scores: probabilities ``(K, H, W)`` at the image's size.
        """
        height, width = scores.shape[1:]
        row = {"id": self._numbers[name], "file_name": f"{name}.jpg"}
        self._images.append(row | {"height": height, "width": width})
        label = label_from_scores(class_ids, scores, self._background)
        for class_id in (int(value) for value in np.unique(label) if value):
            self._annotations.append(self._annotation(row["id"], class_id, label == class_id))

    def _annotation(self, image: object, class_id: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
        runs = self._tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {
            "id": len(self._annotations) + 1,
            "image_id": image,
            "category_id": self._ids[class_id - 1],
            "segmentation": {"size": list(mask.shape), "counts": runs["counts"].decode()},
            "area": int(mask.sum()),
            "bbox": [float(value) for value in self._tools.toBbox(runs)],
            "iscrowd": 0,
        }

    def close(self) -> int:
        """Writes the file; returns its size in bytes. Without images nothing is written."""
        if not self._images:
            return 0
        names = zip(self._ids, self._classes.names, strict=True)
        content = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": [{"id": number, "name": name} for number, name in names],
        }
        text = json.dumps(content).encode()
        return write_atomically(self._path, lambda stream: _write(stream, text))


def _write(stream: Any, text: bytes) -> None:
    stream.write(text)
