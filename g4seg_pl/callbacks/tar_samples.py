"""Samples in WebDataset's tars: the spelling of keys, their bytes, and finding them again.

A sample is the run of members that share what stands before the first dot of their names::

    <key>.png               indexed label file
    <key>.npz or <key>.npy  soft maps, if asked for
    <key>.json              the image's record, with its id; always the last of its sample
"""

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
LAST = "json"


class Place(NamedTuple):
    """Where the content of a member lies in its tar, in bytes."""

    offset: int
    size: int


class StoredSample(NamedTuple):
    """One image in a tar.

    Attributes:
        image_id: of the image.
        members: place of each file's content, by suffix without dot.
        begin: where its first header begins, in bytes.
        end: where the next sample begins.
    """

    image_id: str
    members: dict[str, Place]
    begin: int
    end: int

    def moved(self, begin: int) -> "StoredSample":
        """The same bytes at another place."""
        by = begin - self.begin
        members = {name: Place(offset + by, size) for name, (offset, size) in self.members.items()}
        return StoredSample(self.image_id, members, begin, self.end + by)


def key_of(image_id: str) -> str:
    """The key of an image: its id percent-encoded as in an address, dots and slashes too.

    WebDataset ends a key at the first dot and passes over folders such as ``__a__``.
    """
    return quote(image_id, safe="", errors="surrogateescape").replace(".", "%2E")


def id_of(key: str) -> str:
    """The id that a key spells; the inverse of :func:`key_of`."""
    return unquote(key, errors="surrogateescape")


def padded(size: int) -> int:
    """A number of bytes, rounded up to whole blocks of a tar."""
    return size + -size % tarfile.BLOCKSIZE


def pack(image_id: str, files: Mapping[str, bytes]) -> tuple[bytes, StoredSample]:
    """The bytes of a sample, and where its files lie in them.

    Args:
        image_id: of the image.
        files: contents by suffix; ``json`` must be the last.

    Returns:
        the bytes and a sample that begins at 0; see :meth:`StoredSample.moved`.

    Raises:
        ValueError: ``json`` is not the last.
    """
    if not files or list(files)[-1] != LAST:
        msg = f"a sample ends with {LAST}, got {list(files)}"
        raise ValueError(msg)
    packed, members = bytearray(), {}
    for suffix, content in files.items():
        header = tarfile.TarInfo(f"{key_of(image_id)}.{suffix}")
        header.size = len(content)
        packed += header.tobuf(tarfile.PAX_FORMAT)
        members[suffix] = Place(len(packed), len(content))
        packed += content.ljust(padded(len(content)), b"\0")
    return bytes(packed), StoredSample(image_id, members, 0, len(packed))


def whole_samples(path: Path) -> Iterator[StoredSample]:
    """The samples of a tar that are there to their last byte, up to the first that is not.

    Args:
        path: of a tar that may be unfinished, or cut short.

    Raises:
        FileNotFoundError: there is none.
    """
    begin, members = 0, {}
    size = path.stat().st_size
    for member in _headers(path):
        end = padded(member.offset_data + member.size)
        if end > size:
            return
        key, _, suffix = member.name.partition(".")
        members[suffix] = Place(member.offset_data, member.size)
        if suffix == LAST:
            yield StoredSample(id_of(key), members, begin, end)
            begin, members = end, {}


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, as far as its headers can be read."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                # Kept otherwise, a kilobyte each; typeshed does not know the attribute.
                tar.members.clear()  # type: ignore[attr-defined]
                yield member
    except tarfile.ReadError:  # empty, or it ends within a header or a content
        return
