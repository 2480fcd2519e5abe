"""Opening what an address names: a local path, or anything that fsspec reaches."""

import os
from typing import Any, BinaryIO, cast

from fsspec.core import url_to_fs

from g4seg_pl.types import ConfigurationError


def is_address(text: str | os.PathLike[str]) -> bool:
    """Whether something names a place of fsspec (`s3://…`, `memory://…`) and not a local path."""
    return "://" in str(text) or "::" in str(text)


def filesystem(address: str) -> tuple[Any, str]:
    """The file system of an address, made for this process and thread, and the path in it.

    Args:
        address: a local path, or an address of fsspec.

    Raises:
        ConfigurationError: fsspec does not know the protocol, or lacks the package for it.
    """
    try:
        system, path = url_to_fs(address)
    except ImportError as error:
        message = f"{address}: {error}. Install that package beside g4seg, or copy the files here"
        raise ConfigurationError(message) from error
    except ValueError as error:
        message = f"{address}: {error}. Give a local path, or an address that fsspec knows"
        raise ConfigurationError(message) from error
    return system, str(path)


def open_binary(address: str, *, block: int | None = None) -> BinaryIO:
    """Opens a file for reading parts of it.

    Args:
        address: a local path, or an address of fsspec.
        block: bytes that are read ahead over a network; None reads what is asked for and no more.

    Raises:
        ConfigurationError: as `filesystem`.
        Exception: the file cannot be opened; each file system has its own errors.
    """
    system, path = filesystem(address)
    cache = {"cache_type": "none"} if block is None else {"cache_type": "readahead"}
    # Local files are opened by the same name, and take no part in the caching.
    return cast("BinaryIO", system.open(path, "rb", block_size=block, **cache))
