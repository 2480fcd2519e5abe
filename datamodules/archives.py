"""Reading members of tars where they lie, near or far, without unpacking or copying the tar.

A tar has no table of contents, so its headers are gone through once, from one to the next; the
contents between them are skipped. After that each member is one read at a known place.
"""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import BinaryIO

from datamodules.addresses import open_binary
from datamodules.errors import bad_item
from g4seg_pl.types import ConfigurationError

SCAN_BLOCK = 2**16
"""Bytes read ahead while going through headers: a seed file or two, not a picture of megabytes."""

MOST_OPEN = 32
"""So many tars a process keeps open; systems often allow a process 1024 files."""

_FETCH_AGAIN = "Fetch or write the tar again"


@dataclass(frozen=True)
class _Place:
    """Where the content of a member lies in its tar, in bytes."""

    offset: int
    size: int


class _OpenTars:
    """The tars that one process has open, the latest used last; a process is never handed others'.

    After a fork both processes would move the place in one and the same open file.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        # Taken again by the same thread where the garbage collector ends an archive in between.
        self._lock = RLock()

    def read(self, owner: int, url: str, place: _Place) -> bytes:
        """Reads a part of a tar, which is opened if `owner` has not got it open."""
        with self._lock:
            file = self._files.pop(owner, None) or open_binary(url)
            self._files[owner] = file
            while len(self._files) > MOST_OPEN:
                self._files.popitem(last=False)[1].close()
            file.seek(place.offset)
            return file.read(place.size)

    def close(self, owner: int) -> None:
        """Closes the tar of `owner`, if it is open."""
        with self._lock:
            if file := self._files.pop(owner, None):
                file.close()


_opened = _OpenTars()


def _open_tars() -> _OpenTars:
    """The open tars of this very process."""
    global _opened
    if _opened.process != os.getpid():
        _opened = _OpenTars()
    return _opened


class TarArchive:
    """The members of one uncompressed tar, by name.

    Making one opens nothing. It can be pickled and survives a fork: what it knows of the tar's
    contents goes along, and each process opens the tar for itself, once.

    Args:
        url: a local path, or an address of fsspec such as `s3://bucket/images-000.tar`.
        places: offset and size in bytes of each member's content, from a list that was kept
            beside the tar; None has them found in its headers.
    """

    def __init__(
        self, url: str | Path, places: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        self.url = str(url)
        self._places: dict[str, _Place] | None = None
        if places is not None:
            self._places = {name: _Place(*place) for name, place in places.items()}

    def names(self) -> tuple[str, ...]:
        """The members that are files, as they are called in the tar, in its order.

        Of several members of one name the last is meant, as when a tar is unpacked.

        Raises:
            ConfigurationError: there is no such tar, it is compressed, damaged or cut short, or it
                cannot be reached.
        """
        return tuple(self._index())

    def holds(self, name: str) -> bool:
        """Whether there is such a member."""
        return name in self._index()

    def size(self, name: str) -> int:
        """The size of a member in bytes; errors as of `read`."""
        return self._place(name).size

    def read(self, name: str) -> bytes:
        """The content of a member.

        Args:
            name: as `names` gives it.

        Raises:
            BadItemError: there is no such member, or it cannot be read (any more).
            ConfigurationError: as `names`, if nothing has been read before.
        """
        place = self._place(name)
        try:
            content = _open_tars().read(id(self), self.url, place)
        except Exception as error:  # every file system of fsspec has errors of its own
            self.close()  # a connection that broke is not used again
            problem = f"cannot be read: {_say(error)}"
            raise bad_item(self.address(name), problem, "Check the tar, or try again") from error
        if len(content) != place.size:
            problem = f"the tar ends after {len(content)} of its {place.size} bytes"
            raise bad_item(self.address(name), problem, _FETCH_AGAIN)
        return content

    def address(self, name: str) -> str:
        """A member in words, for errors."""
        return f"{self.url} [{name}]"

    def close(self) -> None:
        """Closes what this process has opened; a later `read` opens it again."""
        _open_tars().close(id(self))

    def __del__(self) -> None:
        """Leaves no file open."""
        self.close()

    def _place(self, name: str) -> _Place:
        place = self._index().get(name)
        if place is None:
            problem = f"no such file among the {len(self._index())} of the tar"
            raise bad_item(self.address(name), problem, "Check the name, or add it to the tar")
        return place

    def _index(self) -> dict[str, _Place]:
        if self._places is None:
            self._places = _scan(self.url)
        return self._places


def _say(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()


def _scan(url: str) -> dict[str, _Place]:
    """Goes through the headers of a tar; ConfigurationError if it does not reach their end."""
    places: dict[str, _Place] = {}
    try:
        with open_binary(url, block=SCAN_BLOCK) as file:
            _scan_open(file, places)
    except FileNotFoundError as error:
        message = f"{url}: no such tar. Check the address"
        raise ConfigurationError(message) from error
    except tarfile.TarError as error:
        after = f", after {next(reversed(places))}" if places else ""
        message = (
            f"{url}: cut short, damaged or no plain tar{after}: {error}. {_FETCH_AGAIN}; a "
            "compressed one has to be decompressed, since it cannot be read in parts"
        )
        raise ConfigurationError(message) from error
    except ConfigurationError:
        raise
    except Exception as error:  # every file system of fsspec has errors of its own
        message = (
            f"{url}: cannot be read: {_say(error)}. Check the address and your rights; the server "
            "must let parts of a file be read"
        )
        raise ConfigurationError(message) from error
    return places


def _scan_open(file: BinaryIO, places: dict[str, _Place]) -> None:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            # Kept otherwise, a kilobyte each; typeshed does not know the attribute.
            tar.members.clear()  # type: ignore[attr-defined]
            if not member.isreg():
                continue
            if member.issparse():
                message = f"{member.name} is stored as a sparse file"
                raise tarfile.TarError(message)
            places.pop(member.name, None)  # so that the last of a name has the last's place
            places[member.name] = _Place(member.offset_data, member.size)
        # tarfile takes the first thing that is no header for the end.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            message = f"no header and no end mark at byte {tar.offset}"
            raise tarfile.TarError(message)
