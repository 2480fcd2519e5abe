"""Files that are not local: members of tars, and files at addresses."""

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol


class Source(Protocol):
    """Something that holds files by name."""

    def read(self, name: str) -> bytes:
        """The content of a file; BadItemError names the file if it cannot be read."""

    def holds(self, name: str) -> bool:
        """Whether there is such a file, from the listing."""

    def address(self, name: str) -> str:
        """A file in words, for errors."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in a tar or at an address; nothing is read before `read_bytes`.

    It has of a path what reading images and seeds needs.

    Attributes:
        source: where it lies.
        key: the name of the file in `source`.
    """

    source: Source
    key: str

    @property
    def name(self) -> str:
        """The name without folders."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """The suffix, in small letters, with the dot."""
        return PurePosixPath(self.key).suffix.lower()

    def read_bytes(self) -> bytes:
        """The content; BadItemError if it cannot be read."""
        return self.source.read(self.key)

    def is_file(self) -> bool:
        """Whether there was such a file when its source was listed."""
        return self.source.holds(self.key)

    def __str__(self) -> str:
        """The address, as it stands in errors."""
        return self.source.address(self.key)


File = Path | StoredFile
"""A local file, which libraries open by its path, or one whose bytes are read first."""


def openable(file: File) -> Path | BinaryIO:
    """What a library can open: the path of a local file, or the bytes of another one.

    Raises:
        BadItemError: the bytes cannot be read.
    """
    return file if isinstance(file, Path) else io.BytesIO(file.read_bytes())
