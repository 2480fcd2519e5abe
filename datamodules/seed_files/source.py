"""Where the seeds of a data set come from: files in a folder or in tars, or one COCO JSON file."""

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, Protocol

from datamodules.addresses import as_location
from datamodules.classes import ClassList
from datamodules.errors import bad_item
from datamodules.files import File
from datamodules.items import numbered
from datamodules.places import Place, open_place
from datamodules.seed_files.coco import CocoFile
from datamodules.seed_files.maps import Dialect, ReadOptions, SeedMaps, check_classes
from datamodules.seed_files.reading import (
    SUFFIXES,
    check_suffix,
    detect,
    read_maps,
    select,
    suffixes_of,
    to_seed,
)
from g4seg_pl.types import ConfigurationError, Seed


class SeedSource(Protocol):
    """The seeds of a data set, by image id.

    Attributes:
        seen: how many seeds this process has read, by dialect.
    """

    seen: Counter[Dialect]

    def read(self, image_id: str, size: tuple[int, int], labels: tuple[int, ...] | None) -> Seed:
        """The seed of an image of height and width `size`; BadItemError if it cannot be used."""

    def read_unsized(self, image_id: str, labels: tuple[int, ...] | None) -> Seed:
        """The seed of an image of unknown size, at its own; BadItemError if it cannot be used."""

    def check(self, image_id: str) -> None:
        """Raises BadItemError if an image has no seed; reads no maps."""

    def names(self, images: Collection[str] = ()) -> list[str]:
        """Image ids that have a seed; `images` names those that the seeds only number."""

    def dialect_of(self, image_id: str) -> Dialect:
        """The dialect of a seed; BadItemError if it cannot be told."""


class SeedFolder:
    """Seed files named by image id, or by the number in that of COCO 2014, in one place.

    Args:
        place: a folder, here or at an address, or tars.
        classes: the class list of the data set.
        dialect: forces one; `auto` detects it file by file.
        options: what the files do not say themselves.
    """

    def __init__(
        self,
        place: Place,
        classes: ClassList,
        dialect: Dialect | Literal["auto"] = "auto",
        options: ReadOptions | None = None,
    ) -> None:
        self._place, self._classes = place, classes
        self._dialect, self._options = dialect, options or ReadOptions()
        self.seen: Counter[Dialect] = Counter()

    def path(self, image_id: str) -> File:
        """The seed file of an image.

        Raises:
            BadItemError: there is none, or more than one that can be of the dialect.
        """
        found = self._place.find(image_id, SUFFIXES)
        if not found and numbered(image_id) != image_id:
            found = self._place.find(numbered(image_id), SUFFIXES)
        if len(found) > 1 and self._dialect != "auto":
            suffixes = suffixes_of(self._dialect)
            found = [path for path in found if path.suffix.lower() in suffixes]
        if len(found) == 1:
            return found[0]
        if found:
            problem = f"several seeds: {', '.join(path.name for path in found)}"
            remedy = "Keep one of them, or set dialect to that of the one that is meant"
            raise bad_item(self._place.where(image_id), problem, remedy)
        remedy = "Make its seed, or leave the image out of the list"
        problem = f"no seed file (looked for {', '.join(SUFFIXES)})"
        raise bad_item(self._place.where(image_id), problem, remedy)

    def read(self, image_id: str, size: tuple[int, int], labels: tuple[int, ...] | None) -> Seed:
        """The seed of an image of height and width `size`; BadItemError if it cannot be used."""
        path = self.path(image_id)
        return self._seed(self._maps(path, labels), size, labels, path)

    def _maps(self, path: File, labels: tuple[int, ...] | None) -> SeedMaps:
        maps = read_maps(path, len(self._classes), self._dialect, labels, self._options)
        self.seen[maps.dialect] += 1
        return maps

    def read_unsized(self, image_id: str, labels: tuple[int, ...] | None) -> Seed:
        """The seed of an image of unknown size, at its own size.

        Raises:
            BadItemError: it cannot be used, or its maps are smaller than the image and it does
                not say the image's size.
        """
        path = self.path(image_id)
        maps = self._maps(path, labels)
        if maps.resizable and maps.image_size is None:
            problem = "its maps are smaller than the image, whose size is unknown"
            raise bad_item(path, problem, "Give the folder of images")
        size = maps.image_size or (maps.maps.shape[1], maps.maps.shape[2])
        return self._seed(maps, size, labels, path)

    def _seed(
        self, maps: SeedMaps, size: tuple[int, int], labels: tuple[int, ...] | None, path: File
    ) -> Seed:
        empty = self._options.empty
        return to_seed(select(maps, labels, path, empty), size, path, empty)

    def check(self, image_id: str) -> None:
        """Raises BadItemError if an image has no seed file, several, an empty or a wrong one.

        Emptiness is looked for in local files; wrong is one that cannot be of the forced dialect.
        """
        path = self.path(image_id)
        if self._dialect != "auto":
            check_suffix(path, self._dialect)
        if isinstance(path, Path) and path.stat().st_size == 0:
            raise bad_item(path, "an empty file", "Make the seed of this image again")

    def names(self, images: Collection[str] = ()) -> list[str]:
        """Names, without suffix, of the seed files; of `images` where files have their numbers."""
        known = {numbered(image_id): image_id for image_id in images}
        return sorted({known.get(name, name) for name, _ in self._place.listed(SUFFIXES)})

    def dialect_of(self, image_id: str) -> Dialect:
        """The dialect that is forced, or that of the file; BadItemError if it cannot be told."""
        return detect(self.path(image_id)) if self._dialect == "auto" else self._dialect


class CocoSeeds:
    """The masks of one COCO JSON file as seeds.

    Args:
        path: the JSON file, a data set or a list of results.
        classes: the class list of the data set.
        options: `category_ids` where the file has no category names.
    """

    def __init__(self, path: Path, classes: ClassList, options: ReadOptions | None = None) -> None:
        self._path, self._classes = path, classes
        self._options = options or ReadOptions()
        self._file = CocoFile(path, classes, self._options)
        self.seen: Counter[Dialect] = Counter()

    def read(self, image_id: str, size: tuple[int, int], labels: tuple[int, ...] | None) -> Seed:
        """The seed of an image of height and width `size`; BadItemError if it cannot be used."""
        maps = self._file.read(image_id, size)
        self.seen[maps.dialect] += 1
        empty = self._options.empty
        check_classes(maps, self._path, len(self._classes), empty)
        return to_seed(select(maps, labels, self._path, empty), size, self._path, empty)

    def read_unsized(self, image_id: str, labels: tuple[int, ...] | None) -> Seed:
        """The seed of an image at the size the file gives; BadItemError if it cannot be used."""
        return self.read(image_id, self._file.size(image_id), labels)

    def check(self, image_id: str) -> None:
        """Raises BadItemError if an image has no mask."""
        self._file.masks(image_id)

    def names(self, images: Collection[str] = ()) -> list[str]:
        """Images that have masks, see `CocoFile.names`."""
        return self._file.names(images)

    def dialect_of(self, image_id: str) -> Dialect:
        """Always `coco`."""
        del image_id
        return "coco"


def open_seeds(
    location: Path | str,
    classes: ClassList,
    dialect: Dialect | Literal["auto"] = "auto",
    options: ReadOptions | None = None,
    opener: Callable[[str, Path | str], Place] = open_place,
) -> SeedSource:
    """Opens a folder of seed files, tars of them, or a COCO JSON file.

    Args:
        location: as `open_place` takes it, or a local JSON file.
        classes: the class list of the data set.
        dialect: forces one; `auto` detects it.
        options: what the files do not say themselves.
        opener: opens the place; one that keeps what it has listed, for instance.

    Raises:
        ConfigurationError: there is nothing of that kind.
    """
    path = as_location(location)
    if isinstance(path, Path) and path.suffix == ".json" and path.is_file():
        return CocoSeeds(path, classes, options)
    if isinstance(path, str) and path.endswith(".json"):
        message = f"seeds: {path} is read as a whole at the start. Copy it here, and give its path"
        raise ConfigurationError(message)
    return SeedFolder(opener("seeds", path), classes, dialect, options)
