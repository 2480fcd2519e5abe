"""COCO's JSON: one file for all images, masks as run lengths or polygons, through pycocotools.

Either a data set (`{images, annotations, categories}`) or a list of results
(`[{image_id, category_id, segmentation, score}]`).
"""

import json
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from datamodules.classes import ClassList
from datamodules.errors import bad_item
from datamodules.items import BARE_NUMBER
from datamodules.seed_files.maps import ReadOptions, SeedMaps, to_contiguous
from g4seg_pl.types import ConfigurationError

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class CocoMask:
    """One annotation or result.

    Attributes:
        category: category id, as in the file.
        segmentation: run lengths or polygons, not yet decoded.
        score: 1 where the file gives none.
        crowd: a region of many things that were not told apart.
    """

    category: int
    segmentation: object
    score: float
    crowd: bool = False


def mask_tools() -> ModuleType:
    """The mask functions of pycocotools.

    Raises:
        ConfigurationError: pycocotools is not installed.
    """
    try:
        mask = import_module("pycocotools.mask")
    except ImportError as error:
        message = "COCO JSON needs pycocotools: pip install 'g4seg-pl[coco]'"
        raise ConfigurationError(message) from error
    return mask


def decode(segmentation: object, size: tuple[int, int], path: Path) -> NDArray[np.bool_]:
    """A mask ``(H, W)`` from run lengths (compressed or not) or a list of polygons.

    Raises:
        BadItemError: it is neither, or of another size than the image.
    """
    tools = mask_tools()
    try:
        if isinstance(segmentation, list):
            runs = tools.merge(tools.frPyObjects(segmentation, *size))
        elif isinstance(cast("Entry", segmentation)["counts"], list):
            runs = tools.frPyObjects(segmentation, *size)
        else:
            runs = segmentation
        found = tuple(cast("Entry", runs)["size"])
        with warnings.catch_warnings():
            # pycocotools 2.0.11's arrays do not know NumPy 2's `copy` argument.
            warnings.simplefilter("ignore", DeprecationWarning)
            mask = tools.decode(runs) if found == size else None
    except Exception as error:  # pycocotools raises whatever its C code stumbles over
        problem = f"a segmentation that is neither run lengths nor polygons: {error}"
        raise bad_item(path, problem, "Write it again with pycocotools") from error
    if mask is None:
        raise bad_item(path, f"a mask of size {found} for an image of {size}", "Check the image")
    return cast("NDArray[np.bool_]", mask.astype(bool))


class CocoFile:
    """The masks of a COCO JSON file, found by image id.

    Args:
        path: the JSON file.
        classes: class list; categories with names are matched with it by name.
        options: `category_ids` says what category ids mean where there are no names.

    Raises:
        ConfigurationError: the file cannot be read, or does not say what its ids mean.
    """

    def __init__(self, path: Path, classes: ClassList, options: ReadOptions) -> None:
        mask_tools()
        self._path, self._classes, self._options = path, classes, options
        try:
            self._index(json.loads(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{path}: no readable COCO JSON: {type(error).__name__} {error}"
            raise ConfigurationError(message) from error
        if not self._categories and options.category_ids is None:
            message = (
                f"{path} has no category names: set category_ids to coco91 (1 to 90 with holes) "
                "or contiguous (label values)"
            )
            raise ConfigurationError(message)

    def _index(self, content: dict[str, Sequence[Entry]] | Sequence[Entry]) -> None:
        full = content if isinstance(content, dict) else {"annotations": content}
        self._categories = {int(row["id"]): str(row["name"]) for row in full.get("categories", [])}
        images = full.get("images", [])
        self._numbers = {Path(row["file_name"]).stem: int(row["id"]) for row in images}
        self._by_digits = {
            int(name.rpartition("_")[2]): number
            for name, number in self._numbers.items()
            if BARE_NUMBER.fullmatch(name)
        }
        self._sizes = {
            int(row["id"]): (int(row["height"]), int(row["width"]))
            for row in images
            if "height" in row and "width" in row
        }
        self._masks: dict[int, list[CocoMask]] = defaultdict(list)
        for row in full["annotations"]:
            score = float(row.get("score", 1.0))
            crowd = bool(row.get("iscrowd", 0))
            mask = CocoMask(int(row["category_id"]), row["segmentation"], score, crowd)
            self._masks[int(row["image_id"])].append(mask)

    def _number(self, image_id: str) -> int | None:
        """COCO's number of an image: by its file name, else the digits its id ends with.

        Where the file names its images, digits count only of COCO's own names, which have changed
        from year to year.
        """
        if image_id in self._numbers:
            return self._numbers[image_id]
        digits = image_id.rpartition("_")[2]
        if not digits.isdecimal():
            return None
        if not self._numbers:
            return int(digits)
        return self._by_digits.get(int(digits)) if BARE_NUMBER.fullmatch(image_id) else None

    @property
    def images(self) -> dict[str, tuple[int, int]]:
        """Height and width of every image that the file lists, with masks or without, by id.

        Raises:
            ConfigurationError: it lists none, or one without its size.
        """
        unsized = [name for name, number in self._numbers.items() if number not in self._sizes]
        if unsized or not self._numbers:
            what = f"no size for {unsized[:3]}" if unsized else "no images"
            message = f"{self._path}: {what}; give COCO's instances JSON"
            raise ConfigurationError(message)
        return {name: self._sizes[number] for name, number in self._numbers.items()}

    def categories(self, image_id: str) -> set[int]:
        """Category ids of an image's masks; empty without masks."""
        return {mask.category for mask in self._found(image_id)}

    def _found(self, image_id: str) -> list[CocoMask]:
        number = self._number(image_id)
        return [] if number is None else self._masks.get(number, [])

    def class_masks(
        self, image_id: str, size: tuple[int, int]
    ) -> list[tuple[int, CocoMask, NDArray[np.bool_]]]:
        """Label value, entry and decoded mask of everything in an image; empty without masks.

        Raises:
            BadItemError: an unknown class or an unreadable segmentation.
        """
        return [
            (self.class_id(mask.category), mask, decode(mask.segmentation, size, self._path))
            for mask in self._found(image_id)
        ]

    def class_id(self, category: int) -> int:
        """Label value of a category.

        Raises:
            BadItemError: the class list does not have it.
        """
        if not self._categories:
            coco91 = self._options.category_ids == "coco91"
            return to_contiguous((category,), self._path)[0] if coco91 else category
        name = self._categories.get(category, f"category {category}")
        class_id = self._classes.find(name)
        if class_id is None:
            problem = f"unknown class {name!r}"
            raise bad_item(self._path, problem, "Add it to the class list as a class or synonym")
        return class_id

    def names(self, images: Collection[str] = ()) -> list[str]:
        """Image ids that have masks: of the file's own images, or of the given ones.

        Args:
            images: ids of pictures, for lists of results, which number images without naming them.

        Raises:
            ConfigurationError: masks of images that nothing names.
        """
        named = [name for name in (self._numbers or images) if self._number(name) in self._masks]
        lost = set(self._masks) - {self._number(name) for name in named}
        if lost:
            message = (
                f"{self._path}: {len(lost)} images, among them {sorted(lost)[:3]}, have masks but "
                "no name: give the folder of images"
            )
            raise ConfigurationError(message)
        return sorted(named)

    def size(self, image_id: str) -> tuple[int, int]:
        """Height and width of an image, from its entry or its run lengths.

        Raises:
            BadItemError: neither says it.
        """
        masks, number = self.masks(image_id), self._number(image_id)
        if number in self._sizes:
            return self._sizes[number]
        for mask in masks:
            if isinstance(mask.segmentation, Mapping) and len(mask.segmentation["size"]) == 2:
                height, width = mask.segmentation["size"]
                return int(height), int(width)
        problem = f"it does not say how large image {image_id} is"
        raise bad_item(self._path, problem, "Give the folder of images")

    def masks(self, image_id: str) -> list[CocoMask]:
        """The masks of an image, not decoded; BadItemError if there is none.

        An image that the file lists may have none where `ReadOptions.empty` keeps that.
        """
        number = self._number(image_id)
        if self._options.empty == "keep" and image_id in self._numbers:
            return self._found(image_id)
        if number is None or number not in self._masks:
            problem = f"no mask for image {image_id}"
            raise bad_item(self._path, problem, "Leave the image out, or add its masks")
        return self._masks[number]

    def read(self, image_id: str, size: tuple[int, int]) -> SeedMaps:
        """Joins the masks of each class of an image: at each pixel the highest score.

        Args:
            image_id: the image's name; its number is looked up or taken from its last digits.
            size: height and width of the image.

        Raises:
            BadItemError: no mask, an unknown class or an unreadable segmentation.
        """
        maps: dict[int, NDArray[np.float32]] = {}
        for mask in self.masks(image_id):
            class_id = self.class_id(mask.category)
            pixels = decode(mask.segmentation, size, self._path) * np.float32(mask.score)
            maps[class_id] = np.maximum(maps.get(class_id, 0), pixels, dtype=np.float32)
        ids = tuple(sorted(maps))
        none = np.zeros((0, *size), np.float32)
        return SeedMaps("coco", ids, np.stack([maps[each] for each in ids]) if ids else none)
