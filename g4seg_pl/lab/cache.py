"""Results on disk, named by everything that determines them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from g4seg_pl.callbacks.run_record import Json, write_text_atomically

# To be raised when a change of code changes results that no setting or weight shows.
RESULTS_VERSION = 1


def canonical(value: Json) -> str:
    """One text for equal settings, whatever the order of their names."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key_of(value: Json) -> str:
    """Sixteen hexadecimal digits that change with any setting."""
    text = canonical([RESULTS_VERSION, value])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_of_files(folder: Path) -> str:
    """Sixteen hexadecimal digits of the names and contents of all files in a folder.

    Folders behind links count: of a model whose parts are linked, they are most.
    """
    digest = hashlib.sha256()
    walked = os.walk(folder, followlinks=True)
    found = (Path(place, name) for place, _, names in walked for name in names)
    for path in sorted(path for path in found if path.is_file()):  # a link may lead nowhere
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def identity_of(model: str | Path) -> str:
    """Hash of the files of a model's folder; the name itself for a hub id."""
    folder = Path(model)
    return hash_of_files(folder) if folder.is_dir() else str(model)


def state_of_files(files: Iterable[Path]) -> str:
    """Sixteen hexadecimal digits that change with the name, size or time of change of a file."""
    digest = hashlib.sha256()
    for path in files:
        found = path.stat() if path.is_file() else None
        state = None if found is None else (found.st_size, found.st_mtime_ns)
        digest.update(repr((str(path), state)).encode())
    return digest.hexdigest()[:16]


class Store:
    """A folder of arrays (.npz), each with the description (.json) that its name is the key of.

    Args:
        root: the folder; made when something is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def load(self, area: str, description: Json) -> dict[str, NDArray[Any]] | None:
        """The arrays saved under a description, or None."""
        path = self._path(area, description).with_suffix(".npz")
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def save(
        self, area: str, description: Json, arrays: dict[str, NDArray[Any]], summary: Json = None
    ) -> None:
        """Save arrays, and beside them what they are and a summary for a reader."""
        path = self._path(area, description)
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(stream: IO[bytes]) -> None:
            np.savez_compressed(stream, allow_pickle=False, **arrays)

        _write_atomically(path.with_suffix(".npz"), write)
        text = json.dumps({"what": description, "summary": summary}, indent=2, sort_keys=True)
        write_text_atomically(path.with_suffix(".json"), text + "\n")

    def _path(self, area: str, description: Json) -> Path:
        return self.root / area / key_of(description)


def _write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    # The process's number keeps two laboratories in one folder from meeting in one file.
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        write(stream)
    temporary.replace(path)
