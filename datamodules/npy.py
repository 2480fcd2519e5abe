"""Reading `.npy` and `.npz` files, checked before any memory is allocated for them."""

import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from datamodules.errors import bad_item
from datamodules.files import File, openable
from datamodules.unpickle import REMEDY, unpickle

MAX_ARRAY_BYTES = 2**31
"""No single array of one image is larger; a header that claims more is refused unread."""


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = npy_format.read_magic(stream)
    if version == (1, 0):
        return npy_format.read_array_header_1_0(stream)
    if version == (2, 0):
        return npy_format.read_array_header_2_0(stream)
    message = f"it has version {version} of the npy format"
    raise ValueError(message)


def _read_stream(stream: IO[bytes], size: int, name: File | str) -> object:
    """One npy file of `size` bytes."""
    try:
        shape, fortran, dtype = _read_header(stream)
    except Exception as error:  # the header is a Python literal: its parser raises many things
        raise bad_item(name, f"no readable npy header: {error}", REMEDY) from error
    body = size - stream.tell()
    if dtype.kind == "O":
        content = unpickle(stream.read(), name)
        return content[0] if isinstance(content, list) and len(content) == 1 else content
    claimed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if dtype.kind not in "biuf" or claimed != body or claimed > MAX_ARRAY_BYTES:
        problem = f"the header claims {dtype} {shape}, the file holds {body} bytes of data"
        raise bad_item(name, problem, "Write the file again, it is cut short or not an array")
    flat = np.frombuffer(stream.read(), dtype=dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def read_npy(path: File) -> object:
    """Reads a `.npy` file safely: an array, or the one object that `np.save` wrapped.

    Args:
        path: a file written by `numpy.save`, with or without `allow_pickle`.

    Raises:
        BadItemError: not a npy file, cut short, or its pickle holds anything but data.
    """
    if not isinstance(path, Path):
        content = path.read_bytes()
        return _read_stream(io.BytesIO(content), len(content), path)
    try:
        with path.open("rb") as stream:
            return _read_stream(stream, path.stat().st_size, path)
    except OSError as error:
        raise bad_item(path, f"cannot be opened: {error.strerror}", "Check the path") from error


def _members(path: File, archive: zipfile.ZipFile) -> Iterator[tuple[str, object]]:
    for info in archive.infolist():
        if info.file_size > MAX_ARRAY_BYTES:
            problem = f"{info.filename} claims {info.file_size} bytes"
            raise bad_item(path, problem, "Write the file again, no seed is that large")
        with archive.open(info) as stream:
            content = _read_stream(stream, info.file_size, f"{path} [{info.filename}]")
        yield info.filename.removesuffix(".npy"), content


def read_npz(path: File) -> dict[str, object]:
    """Reads a `.npz` archive safely: its arrays by name.

    Args:
        path: a file written by `numpy.savez` or `numpy.savez_compressed`.

    Raises:
        BadItemError: as `read_npy`, or not a zip archive.
    """
    stream = openable(path)
    try:
        with zipfile.ZipFile(stream) as archive:
            return dict(_members(path, archive))
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise bad_item(path, f"no readable npz archive: {error}", "Write it again") from error
