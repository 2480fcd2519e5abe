"""Where the files of a data set lie: a local folder, a folder at an address, or tars.

An id is the name of a file in a folder without its suffix. In a tar it is WebDataset's key without
folders, the name up to its first dot, and what follows is the suffix: `a/0001.jpg` and `b/0001.npy`
are two files of the image `0001`.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from datamodules.addresses import as_location, expand, is_address
from datamodules.archives import TarArchive
from datamodules.files import File
from datamodules.items import ImageFolder
from datamodules.stored import RemoteFolder, TarFolder
from g4seg_pl.types import ConfigurationError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Place(Protocol):
    """Files by image id and suffix."""

    def listed(self, suffixes: Sequence[str]) -> list[tuple[str, File]]:
        """The id of every file with one of the suffixes, with the file."""

    def find(self, image_id: str, suffixes: Sequence[str]) -> list[File]:
        """The files of an id, in the order of the suffixes."""

    def picture(self, image_id: str) -> File:
        """The picture of an id; one that cannot be read if there is none."""

    def at(self, name: str) -> File:
        """The file of this name; one that cannot be read if there is none."""

    def where(self, image_id: str) -> str:
        """The place of an id in words, for errors."""


class LocalFolder:
    """The files of a local folder; folders in it are not entered.

    Args:
        folder: it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _pictures(self) -> ImageFolder:
        return ImageFolder(self._folder)

    def listed(self, suffixes: Sequence[str]) -> list[tuple[str, File]]:
        """The id of every file with one of the suffixes, with the file, by name."""
        paths = sorted(self._folder.iterdir())
        return [(path.stem, path) for path in paths if path.suffix.lower() in suffixes]

    def find(self, image_id: str, suffixes: Sequence[str]) -> list[File]:
        """The files of an id, in the order of the suffixes."""
        each = dict.fromkeys(spelled for suffix in suffixes for spelled in (suffix, suffix.upper()))
        names = (self._folder / f"{image_id}{suffix}" for suffix in each)
        found = [path for path in names if path.is_file()]
        # Where case does not count, two spellings are one file.
        return [path for at, path in enumerate(found) if not any(map(path.samefile, found[:at]))]

    def picture(self, image_id: str) -> File:
        """The picture of an id, from one listing of the folder."""
        return self._pictures.find(image_id)

    def at(self, name: str) -> File:
        """The file of this name, there or not."""
        return self._folder / name

    def where(self, image_id: str) -> str:
        """The place of an id in words, for errors."""
        return str(self._folder / image_id)


def open_place(argument: str, location: str | Path) -> Place:
    """Opens and lists what a user named.

    Args:
        argument: its name, for errors.
        location: a local folder; a tar, or a pattern of tars (`images-{000..009}.tar`, `*.tar`),
            here or at an address; or the address of a folder.

    Raises:
        ConfigurationError: there is none of these, it cannot be read, or a tar is compressed.
    """
    folder = as_location(location)
    if isinstance(folder, Path) and folder.is_dir():
        return LocalFolder(folder)
    try:
        return _open_stored(str(location))
    except ConfigurationError as error:
        message = f"{argument}: {error}"
        raise ConfigurationError(message) from error


def is_tar(location: str | Path) -> bool:
    """Whether a name or pattern is that of tars; a web address may ask for something after it."""
    name = str(location)
    asked = name.partition("?")[0] if is_address(name) else name
    return asked.endswith((".tar", *_COMPRESSED))


def _open_stored(location: str) -> Place:
    if not is_tar(location):
        if not is_address(location):
            message = f"no folder {location}. Check the path"
            raise ConfigurationError(message)
        return RemoteFolder(location)
    urls = expand(location)
    if not urls:
        message = f"no tar is called {location}. Check the pattern"
        raise ConfigurationError(message)
    if compressed := [url for url in urls if url.partition("?")[0].endswith(_COMPRESSED)]:
        message = f"{compressed[0]} is compressed, which cannot be read in parts. Decompress it"
        raise ConfigurationError(message)
    return TarFolder(location, [TarArchive(url) for url in urls])
