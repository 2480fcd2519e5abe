"""Opening what an address names: a local path, or anything that fsspec reaches."""

import glob
import os
import re
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.core import url_to_fs

from g4seg_pl.types import ConfigurationError

MOST_FILES = 100_000
"""A pattern that stands for more files than this is taken for a slip of the pen."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")


def is_address(text: str | os.PathLike[str]) -> bool:
    """Whether something names a place of fsspec (`s3://…`, `memory://…`) and not a local path."""
    return "://" in str(text) or "::" in str(text)


def as_location(text: str | Path) -> Path | str:
    """An address as it is, for a path would lose one of its slashes; anything else as a path."""
    return str(text) if is_address(text) else Path(text).expanduser()


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
    if not is_address(address):
        return Path(address).open("rb")
    system, path = filesystem(address)
    cache = {"cache_type": "none"} if block is None else {"cache_type": "readahead"}
    return cast("BinaryIO", system.open(path, "rb", block_size=block, **cache))


def expand(pattern: str) -> list[str]:
    """The addresses that a pattern stands for: `{000..009}`, `{a,b}`, `*`; locally `?`, `[…]` too.

    Args:
        pattern: a local path or an address. Braces stand for names whether there is such a file
            or not, in their order; the others for those that are there, by name.

    Raises:
        ConfigurationError: a range that counts down, or more than ``MOST_FILES`` names.
    """
    parts = _BRACES.split(pattern)
    choices = [_choices(part) if index % 2 else [part] for index, part in enumerate(parts)]
    total = 1
    for each in choices:
        total *= len(each)
    if total > MOST_FILES or not total:
        message = f"{pattern}: stands for {total} files. Give a range that counts up, {{000..009}}"
        raise ConfigurationError(message)
    return [found for each in product(*choices) for found in _glob("".join(each))]


def _choices(text: str) -> list[str]:
    """What a pair of braces stands for; a range keeps its leading zeros."""
    if not (match := _RANGE.fullmatch(text)):
        return text.split(",")
    first, last = match.groups()
    width = len(first)
    count = range(int(first), min(int(last), int(first) + MOST_FILES) + 1)
    return [f"{number:0{width}d}" for number in count]


def _glob(pattern: str) -> list[str]:
    if not is_address(pattern):
        magic = glob.has_magic(pattern) and not Path(pattern).exists()
        return sorted(glob.glob(pattern)) if magic else [pattern]  # noqa: PTH207 (one string)
    if "*" not in pattern:  # ? begins what a web address is asked
        return [pattern]
    system, path = filesystem(pattern)
    try:
        found = sorted(system.glob(path))
    except Exception as error:  # every file system of fsspec has errors of its own
        message = f"{pattern}: cannot be listed: {error}. Check the address and your rights"
        raise ConfigurationError(message) from error
    # What stands before the last :: (such as a cache) belongs to each of them.
    chain, colons, _ = pattern.rpartition("::")
    return [f"{chain}{colons}{system.unstrip_protocol(each)}" for each in found]
