"""Image-level labels: which classes are in an image, from annotations or from one file.

Files: lines `id 3 14` (0-based class ids, as in CLIP-ES's lists) or `id dog person` (names); or
the `cls_labels.npy` of IRN, SEAM and MCTformer, `{id: one-hot array}`, read without executing it.
An array has a value for each class of the list; for COCO's 80 also one for each category id, 1 to
90 (90 values, as WeakTr has them) or 0 to 90 (91). Ids may have a picture's suffix: `id.jpg`.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree

import numpy as np

from datamodules.classes import ClassList
from datamodules.errors import bad_item
from datamodules.items import BARE_NUMBER, numbered, read_lines
from datamodules.npy import read_npy
from datamodules.seed_files.maps import COCO_CATEGORY_IDS
from g4seg_pl.types import BadItemError, ConfigurationError


class LabelSource(Protocol):
    """Image-level labels by image id."""

    def read(self, image_id: str) -> tuple[int, ...]:
        """Label values, 1-based and ascending; BadItemError if there are none."""


class XmlLabels:
    """VOC's annotations: the names of the objects in `<id>.xml`, difficult ones included.

    Args:
        folder: the folder of XML files.
        classes: the class list; names and synonyms count.

    Raises:
        ConfigurationError: there is no such folder.
    """

    def __init__(self, folder: Path, classes: ClassList) -> None:
        if not folder.is_dir():
            message = f"labels: no folder {folder}; give the file of labels, or labels=seed"
            raise ConfigurationError(message)
        self._folder, self._classes = folder, classes

    def read(self, image_id: str) -> tuple[int, ...]:
        """Label values of an image; BadItemError without a readable annotation."""
        path = self._folder / f"{image_id}.xml"
        # "object/name" leaves out the names of an object's parts (head, hand, foot).
        names = [node.text or "" for node in _parse(path).findall("object/name")]
        return _known(names, self._classes, path)


def _parse(path: Path) -> ElementTree.Element:
    try:
        text = path.read_bytes()
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise bad_item(path, "an annotation that defines entities", "Write plain VOC XML")
        return ElementTree.fromstring(text)
    except OSError as error:
        raise bad_item(path, f"no annotation: {error.strerror}", "Add it to the folder") from error
    except ElementTree.ParseError as error:
        raise bad_item(path, f"an annotation that is no XML: {error}", "Get it again") from error


def _known(names: Iterable[str], classes: ClassList, path: Path) -> tuple[int, ...]:
    found = {name: classes.find(name) for name in names}
    if unknown := [name for name, class_id in found.items() if class_id is None]:
        remedy = "Add them to the class list as classes or synonyms"
        raise bad_item(path, f"unknown classes {unknown[:5]}", remedy)
    if not found:
        raise bad_item(path, "no class in the annotation", "Leave the image out of the list")
    return tuple(sorted({class_id for class_id in found.values() if class_id is not None}))


class FileLabels:
    """Labels of all images from one file.

    Args:
        path: a text file, or a `.npy` dictionary.
        classes: the class list.

    Raises:
        ConfigurationError: there is no such file, it cannot be read, or its arrays number other
            classes than the list.
    """

    def __init__(self, path: Path, classes: ClassList) -> None:
        if not path.is_file():
            message = f"labels: no file {path}; give seed, annotations, or the file of labels"
            raise ConfigurationError(message)
        self._path, self._classes = path, classes
        self._numbered = path.suffix == ".npy"  # IRN's have numbers for names
        try:
            self._rows = _npy_rows(path, len(classes)) if self._numbered else _text_rows(path)
        except (BadItemError, ValueError, TypeError) as error:
            message = f"labels: {error}"
            raise ConfigurationError(message) from error

    def read(self, image_id: str) -> tuple[int, ...]:
        """Label values of an image; BadItemError if the file does not list it."""
        row = self._rows.get(image_id)
        if row is None and (self._numbered or BARE_NUMBER.fullmatch(image_id)):
            row = self._rows.get(_number(image_id)) or self._rows.get(numbered(image_id))
        if row is None:
            raise bad_item(self._path, f"no labels for image {image_id}", "Add it to the file")
        if all(field.isdecimal() for field in row):
            return self._from_ids(sorted({int(field) + 1 for field in row}), image_id)
        return _known(row, self._classes, self._path)

    def _from_ids(self, ids: list[int], image_id: str) -> tuple[int, ...]:
        if not ids or ids[-1] > len(self._classes):
            problem = f"image {image_id} has 0-based class ids {[number - 1 for number in ids]}"
            remedy = f"Expected at least one, each below {len(self._classes)}; check class_names"
            raise bad_item(self._path, problem, remedy)
        return tuple(ids)


def _number(image_id: str) -> str:
    """An id as IRN writes it as a number: 2007_000032 is 2007000032, COCO's without the name."""
    return (re.sub(r"\D", "", re.sub(r"^COCO_[a-z]+\d+_", "", image_id))).lstrip("0")


def _bare(key: str) -> str:
    """An image id from a key of a file, which may be the name of a picture."""
    return re.sub(r"\.(jpe?g|png)\Z", "", key, flags=re.IGNORECASE)


def _text_rows(path: Path) -> dict[str, list[str]]:
    """Fields by image id; names of two words are joined by underscores in the file."""
    lines = [line.split() for line in read_lines(path, "labels")]
    return {_bare(line[0]): line[1:] for line in lines if line}


def _npy_rows(path: Path, classes: int) -> dict[str, list[str]]:
    """0-based class ids by image id."""
    content = read_npy(path)
    if not isinstance(content, Mapping):
        raise bad_item(path, "not a dictionary of labels by image id", "Write {id: one-hot array}")
    arrays = {_bare(str(key)): np.asarray(hot).reshape(-1) for key, hot in content.items()}
    first = _first_category(path, {len(hot) for hot in arrays.values()}, classes)
    rows = {}
    for image_id, hot in arrays.items():
        places = [int(place) for place in np.flatnonzero(hot > 0)]
        found = places if first is None else _from_categories(path, image_id, places, first)
        rows[image_id] = [str(place) for place in found]
    return rows


def _first_category(path: Path, lengths: set[int], classes: int) -> int | None:
    """The COCO category id of the arrays' first value; None where that is of the first class.

    Args:
        path: the file, for errors.
        lengths: of its arrays; one that holds no array says nothing.
        classes: how many the list has.

    Raises:
        BadItemError: an array has a value for something else than the classes of the list.
    """
    if lengths <= {classes}:
        return None
    if classes == len(COCO_CATEGORY_IDS) and lengths in ({90}, {91}):
        return 1 if lengths == {90} else 0
    told = " and ".join(str(length) for length in sorted(lengths)[:5])
    problem = f"one-hot arrays of {told} values for a class list of {classes}"
    remedy = "Give the class_names that the file numbers, or write one value for each class"
    raise bad_item(path, problem, remedy)


def _from_categories(path: Path, image_id: str, places: list[int], first: int) -> list[int]:
    """0-based class ids of an image, of places counted in COCO's category ids.

    Raises:
        BadItemError: a category id is none of the 80.
    """
    numbers = [place + first for place in places]
    if unknown := [number for number in numbers if number not in COCO_CATEGORY_IDS]:
        problem = f"image {image_id} has category ids {unknown}, not among COCO's 80 things"
        raise bad_item(path, problem, "Write one value for each class of the list instead")
    return [COCO_CATEGORY_IDS.index(number) for number in numbers]
