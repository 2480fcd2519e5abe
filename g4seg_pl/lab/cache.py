"""Results on disk, named by everything that determines them."""

import ast
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from g4seg_pl.callbacks.run_record import Json, write_text_atomically

# To be raised when a change of code changes results that no setting or weight shows.
RESULTS_VERSION = 2

# What makes results of images and settings.
_PACKAGE = Path(__file__).parents[1]
_DETERMINING = (
    *("core", "features", "backbones", "seeds", "evaluation", "refiner.py"),
    *("lab/chain.py", "lab/controls.py", "lab/runner.py", "lab/scores.py", "lab/stages.py"),
)


@cache
def code_identity() -> str:
    """Sixteen hexadecimal digits that change with the code that makes results.

    Comments and docstrings do not count. Keys do not hold it: days of work would be lost to a
    change that leaves results as they are, so the store says when other code made what it reads.
    """
    places = [_PACKAGE / name for name in _DETERMINING]
    files = [
        path for place in places for path in (place.rglob("*.py") if place.is_dir() else [place])
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(_PACKAGE)).encode())
        digest.update(ast.dump(_without_docstrings(ast.parse(path.read_bytes()))).encode())
    return digest.hexdigest()[:16]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
    return tree


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


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
        self._told = False

    def load(self, area: str, description: Json) -> dict[str, NDArray[Any]] | None:
        """The arrays saved under a description, or None."""
        path = self._path(area, description).with_suffix(".npz")
        if not path.is_file():
            return None
        self._tell_of_other_code(path.with_suffix(".json"))
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
        content = {"what": description, "summary": summary, "code": code_identity()}
        text = json.dumps(content, indent=2, sort_keys=True)
        write_text_atomically(path.with_suffix(".json"), text + "\n")

    def _tell_of_other_code(self, beside: Path) -> None:
        """Say, once, that results are read which other code made."""
        if self._told or not beside.is_file():
            return
        if json.loads(beside.read_text(encoding="utf-8")).get("code") != code_identity():
            self._told = True
            told = (
                f"{self.root}: results of another version of the code are read, such as {beside}; "
                "remove the folder to make them anew"
            )
            print(told, file=sys.stderr, flush=True)

    def _path(self, area: str, description: Json) -> Path:
        return self.root / area / key_of(description)


def _write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    # The process's number keeps two laboratories in one folder from meeting in one file.
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        write(stream)
    temporary.replace(path)
