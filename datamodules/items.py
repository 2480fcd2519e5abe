"""The list of a data set: ids, their safety, list files and shards."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datamodules.files import File
from g4seg_pl.types import BadItemError, ConfigurationError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LONGEST_ID = 251  # 255 bytes, with .png

# Names that differ by letters are other images; only COCO's file names are their numbers.
BARE_NUMBER = re.compile(r"(COCO_[a-z]+\d+_)?\d+")


def numbered(image_id: str) -> str:
    """The name under which other projects keep files of a picture of COCO 2014: its digits alone.

    Any other id is its own.
    """
    return image_id.rpartition("_")[2] if BARE_NUMBER.fullmatch(image_id) else image_id


@dataclass(frozen=True)
class Item:
    """One image of a data set, as listed; no file has been opened.

    Attributes:
        image_id: names the image's seed and its outputs.
        image: the picture.
        truth: its ground truth, if the data set has any.
    """

    image_id: str
    image: File
    truth: File | None = None


@dataclass(frozen=True)
class Line:
    """One line of a list file.

    Attributes:
        image_id: bare name, or the stem of the image path.
        image: path of the image relative to the root, if the line gives it.
        truth: path of the ground truth relative to the root, if the line gives it.
    """

    image_id: str
    image: str | None = None
    truth: str | None = None


def check_id(image_id: str) -> None:
    """Refuses ids that would lead out of a folder when joined to it.

    Raises:
        BadItemError: empty, `..`, too long for a file, or with a slash, a backslash or control
            characters in it.
    """
    strange = re.search(r"[/\\\x00-\x1f\x7f]|^~|^[A-Za-z]:", image_id)
    if strange or image_id in ("", ".", ".."):
        message = f"image id {image_id!r}: not a plain file name. Rename the image and its entry"
        raise BadItemError(message)
    if len(os.fsencode(image_id)) > LONGEST_ID:
        message = f"image id {image_id!r}: longer than {LONGEST_ID} bytes. Rename the image"
        raise BadItemError(message)


def parse_line(line: str) -> Line:
    """One line of a list: an id, or the paths of image and truth; further fields are skipped.

    Paths are relative to the root of the data set also where they begin with a slash.
    """
    first, *rest = line.split()
    if "." not in first and "/" not in first:
        return Line(first)  # nearly every line of a long list
    path = PurePosixPath(first)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return Line(first)
    truth = rest[0].lstrip("/") if rest and rest[0].lower().endswith(".png") else None
    if len(path.parts) == 1:
        return Line(path.stem, None, truth)
    if ".." in path.parts:
        return Line(first)  # refused as an id when the item is read
    return Line(path.stem, first.lstrip("/"), None if truth and ".." in truth else truth)


def read_lines(path: Path, argument: str) -> list[str]:
    """The lines of a text file in UTF-8, without the mark that Windows puts before the first.

    Args:
        path: where it lies.
        argument: what named it, for errors.

    Raises:
        ConfigurationError: it is no such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        message = f"{argument}: {path} is not a text file in UTF-8: {error}"
        raise ConfigurationError(message) from error


def read_list(path: Path, argument: str = "split") -> list[Line]:
    """Reads a list file.

    Args:
        path: where it lies.
        argument: what named it, for errors.

    Raises:
        ConfigurationError: there is no such file, or it is empty or no text.
    """
    if not path.is_file():
        message = f"{argument}: no list file {path}"
        raise ConfigurationError(message)
    entries = [parse_line(line) for line in read_lines(path, argument) if line.strip()]
    if not entries:
        message = f"{argument}: the list file {path} is empty"
        raise ConfigurationError(message)
    return entries


def check_unique(items: list[Item]) -> None:
    """Refuses two images of one id: they would share one output file.

    Raises:
        ConfigurationError: naming the first few.
    """
    counts = Counter(item.image_id for item in items)
    if twice := [image_id for image_id, count in counts.items() if count > 1]:
        message = (
            f"{len(twice)} ids are listed twice, among them {twice[:3]}: list each image once, and "
            "keep label files of the same names, such as a.png of a.jpg, in a folder of their own"
        )
        raise ConfigurationError(message)


def take_shard(items: list[Item], shard: str | None) -> list[Item]:
    """The items of shard `i/n`: every n-th, so that shards are alike.

    Shards 1/n to n/n hold every item once. 0/n is another name of n/n, so that an array of jobs
    may count from 0 to n - 1 as well.

    Raises:
        ConfigurationError: `shard` is not of that form.
    """
    if shard is None:
        return items
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
    index, count = (int(match[1]), int(match[2])) if match else (1, 0)
    if count < 1 or index > count:
        message = (
            f"shard: {shard!r} is not i/n: give shards 1/4 to 4/4, or 0/4 to 3/4, to split the "
            "data in four"
        )
        raise ConfigurationError(message)
    return items[(index - 1) % count :: count]


class ImageFolder:
    """The pictures of a folder by id, from one listing instead of a look at each file.

    Args:
        folder: where they lie; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Path.iterdir would make a path of each name.
        names = os.listdir(folder) if folder.is_dir() else ()  # noqa: PTH208
        parts = ((name, *os.path.splitext(name)) for name in names)  # noqa: PTH122
        self._names = {(stem, suffix.lower()): name for name, stem, suffix in parts}

    def find(self, image_id: str) -> Path:
        """The picture of an id; the first suffix, `.jpg`, if there is none."""
        names = (self._names.get((image_id, suffix)) for suffix in IMAGE_SUFFIXES)
        found = next((name for name in names if name), None)
        return self.folder / (found or f"{image_id}{IMAGE_SUFFIXES[0]}")
