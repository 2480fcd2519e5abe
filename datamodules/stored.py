"""Folders at addresses, and tars, as places of a data set: listed once, read file by file."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from datamodules.addresses import filesystem
from datamodules.archives import TarArchive
from datamodules.errors import bad_item
from datamodules.files import File, StoredFile
from datamodules.items import IMAGE_SUFFIXES
from g4seg_pl.callbacks.tar_samples import key_of
from g4seg_pl.types import ConfigurationError

SUFFIXES = (*IMAGE_SUFFIXES, ".npy", ".npz", ".mat")
"""Files that are pictures, masks or seeds; others play no part."""

SCANNING_THREADS = 8


class _Listed(ABC):
    """Files that were listed once, by id and suffix."""

    def __init__(self, files: Iterable[StoredFile]) -> None:
        self._files: dict[str, dict[str, StoredFile]] = {}
        for file in files:
            image_id, suffix = self._split(file.name)
            if image_id and suffix in SUFFIXES:
                self._add(image_id, suffix, file)

    @staticmethod
    @abstractmethod
    def _split(name: str) -> tuple[str, str]:
        """Id and suffix, in small letters, of a name."""

    def _add(self, image_id: str, suffix: str, file: StoredFile) -> None:
        self._files.setdefault(image_id, {})[suffix] = file

    def find(self, image_id: str, suffixes: Sequence[str]) -> list[File]:
        """The files of an id, in the order of the suffixes."""
        files = self._files.get(image_id, {})
        return [files[suffix] for suffix in suffixes if suffix in files]

    def picture(self, image_id: str) -> File:
        """The picture of an id; one that cannot be read if there is none."""
        found = self.find(image_id, IMAGE_SUFFIXES)
        return found[0] if found else self.at(f"{image_id}{IMAGE_SUFFIXES[0]}")

    @abstractmethod
    def at(self, name: str) -> File:
        """The file of this name; one that cannot be read if there is none."""


class RemoteFolder(_Listed):
    """The files of a folder at an address, listed once; folders in it are not entered.

    Args:
        address: of the folder.

    Raises:
        ConfigurationError: it cannot be listed.
    """

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        super().__init__(StoredFile(self, name) for name in self._names())

    def _names(self) -> list[str]:
        system, path = filesystem(self._address)
        try:
            entries = system.ls(path, detail=True)
        except FileNotFoundError as error:
            message = f"{self._address}: no such folder. Check the address"
            raise ConfigurationError(message) from error
        except Exception as error:  # every file system of fsspec has errors of its own
            problem = f"cannot be listed: {type(error).__name__} {error}"
            message = f"{self._address}: {problem}. Check the address and your rights"
            raise ConfigurationError(message) from error
        return sorted(
            PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "file"
        )

    @staticmethod
    def _split(name: str) -> tuple[str, str]:
        path = PurePosixPath(name)
        return path.stem, path.suffix.lower()

    def listed(self, suffixes: Sequence[str]) -> list[tuple[str, File]]:
        """The id of every file with one of the suffixes, with the file, by id."""
        return [
            (image_id, file)
            for image_id, files in self._files.items()
            for suffix, file in files.items()
            if suffix in suffixes
        ]

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            BadItemError: there is no such file, or it cannot be read.
        """
        try:
            # Anew each time, for a file system must not go through a fork; fsspec keeps them.
            system, path = filesystem(self.address(name))
            content: bytes = system.cat_file(path)
        except FileNotFoundError as error:
            raise bad_item(self.address(name), "no such file", "Check the id") from error
        except Exception as error:  # every file system of fsspec has errors of its own
            problem = f"cannot be read: {type(error).__name__} {error}"
            raise bad_item(self.address(name), problem, "Check your rights, or retry") from error
        return content

    def holds(self, name: str) -> bool:
        """Whether there was such a file when the folder was listed."""
        image_id, suffix = self._split(name)
        return suffix in self._files.get(image_id, {})

    def address(self, name: str) -> str:
        """The address of a file."""
        return f"{self._address}/{name}"

    def at(self, name: str) -> File:
        """The file of this name, there or not."""
        return StoredFile(self, name)

    def where(self, image_id: str) -> str:
        """The place of an id in words, for errors."""
        return self.address(image_id)


class TarFolder(_Listed):
    """The files in tars.

    Args:
        pattern: of the tars, as the user gave it.
        archives: the tars, at least one.

    Raises:
        ConfigurationError: a tar cannot be read, or two files have the same id and suffix.
    """

    def __init__(self, pattern: str, archives: Sequence[TarArchive]) -> None:
        self._pattern, self._first = pattern, archives[0]
        with ThreadPoolExecutor(min(SCANNING_THREADS, len(archives))) as threads:
            names = list(threads.map(TarArchive.names, archives))
        pairs = zip(archives, names, strict=True)
        super().__init__(StoredFile(archive, name) for archive, found in pairs for name in found)

    @staticmethod
    def _split(name: str) -> tuple[str, str]:
        image_id, dot, extension = name.partition(".")
        return image_id, f"{dot}{extension}".lower()

    def _add(self, image_id: str, suffix: str, file: StoredFile) -> None:
        if other := self._files.get(image_id, {}).get(suffix):
            message = f"image {image_id} is there twice, as {other} and {file}. Keep one of them"
            raise ConfigurationError(message)
        super()._add(image_id, suffix, file)

    def find(self, image_id: str, suffixes: Sequence[str]) -> list[File]:
        """The files of an id, in the order of the suffixes; the key may spell the id."""
        # In the tars that g4seg writes it does, or WebDataset would end it at the id's first dot.
        return super().find(image_id, suffixes) or super().find(key_of(image_id), suffixes)

    def listed(self, suffixes: Sequence[str]) -> list[tuple[str, File]]:
        """Every id, in the tars' order, with its file of the first of the suffixes that it has.

        A picture and its label image share a tar as `0001.jpg` and `0001.png`.
        """
        found = ((image_id, self.find(image_id, suffixes)) for image_id in self._files)
        return [(image_id, files[0]) for image_id, files in found if files]

    def at(self, name: str) -> File:
        """The file of this name without folders; one that cannot be read if there is none."""
        image_id, suffix = self._split(PurePosixPath(name).name)
        return self._files.get(image_id, {}).get(suffix) or StoredFile(self._first, name)

    def where(self, image_id: str) -> str:
        """The place of an id in words, for errors."""
        return f"{self._pattern} [{image_id}]"
