"""run.json: what made a folder of masks, and whether a run may be continued in it."""

import hashlib
import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import nn

from g4seg_pl.callbacks.arguments import bound_to, init_arguments, own_text, path_of
from g4seg_pl.types import ConfigurationError

Json = Any
"""What `json` writes: None, bool, int, float, str, and lists and string-keyed dicts of these."""

RECORDED_PACKAGES = (
    "g4seg-pl",
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "open_clip_torch",
    "pydensecrf2",
    "numpy",
    "pillow",
)

# Arguments that change how fast a run goes or which images it takes, but no mask.
NOT_COMPARED = frozenset(
    {
        "batch_size",
        "num_workers",
        "pin_memory",
        "prefetch_factor",
        "persistent_workers",
        "shard",
        "limit",
        "processes",
        "masks_per_pass",
        "channels_last",
    }
)

_CODE = (type, FunctionType, MethodType, BuiltinFunctionType)


def describe(value: object) -> Json:
    """What an argument or a configured object is, in terms JSON can hold.

    Objects are described as jsonargparse would write them: the class path and the arguments of
    ``__init__``, see ``init_arguments``; those written in C and the like, by what they print.

    Args:
        value: anything that a configuration may hold.

    Raises:
        ConfigurationError: an object does not keep what it was made with.
    """
    match value:
        case Enum():
            return value.name
        case np.generic():
            return describe(value.item()) if value.dtype.char not in "gG" else str(value)
        case None | bool() | int() | float() | str():
            return value
        case Path() | torch.device() | torch.dtype():
            return str(value)
        case Mapping():
            return {str(key): describe(item) for key, item in value.items()}
        case set() | frozenset():
            return sorted((describe(item) for item in value), key=json.dumps)
        case Sequence():
            return [describe(item) for item in value]
        case torch.Tensor() | np.ndarray():
            return _describe_array(value)
    return _describe_code(value) if isinstance(value, _CODE) else _describe_object(value)


def _describe_object(value: object) -> Json:
    """Class path and arguments; what the object prints in place of arguments it does not have."""
    text = own_text(value)
    try:
        arguments = init_arguments(value, NOT_COMPARED)
    except ConfigurationError:
        if text is None:
            raise
        arguments = {}
    if not arguments and text is not None:
        arguments = {"text": text}
    described = {name: describe(item) for name, item in arguments.items()}
    return {"class_path": class_path(value), "init_args": described}


def _describe_code(value: Any) -> Json:
    """A class or function: where it is imported from, and what it was bound to."""
    path = path_of(value)
    bound = {} if isinstance(value, type) else bound_to(value)
    if not bound:
        return path
    # What a decorator closes over may be anything; an object whose method it is must be known.
    described = {n: (describe if n == "self" else describe_beside)(it) for n, it in bound.items()}
    return {"class_path": path, "init_args": described}


def _describe_array(value: "torch.Tensor | np.ndarray[Any, Any]") -> Json:
    """The number that it holds, or its shape and a hash of its numbers.

    Weights of networks are told by their shape: random ones differ until the others are loaded.
    """
    if isinstance(value, nn.Parameter):
        return {"class_path": class_path(value), "init_args": {"shape": list(value.shape)}}
    if math.prod(value.shape) == 1:
        return describe(value.item())
    array = value if isinstance(value, np.ndarray) else value.detach().cpu().double().numpy()
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    content = {"dtype": str(value.dtype), "shape": list(array.shape), "sha256": digest}
    return {"class_path": class_path(value), "init_args": content}


def describe_beside(value: object) -> Json:
    """As ``describe``; of an object that does not keep what it was made with, the class path.

    For what is recorded beside the configuration.
    """
    try:
        return describe(value)
    except ConfigurationError:
        return class_path(value)


def class_path(value: object) -> str:
    """Where the class of an object is imported from."""
    return path_of(type(value))


def differing_keys(ours: Json, theirs: Json, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two configurations differ.

    Args:
        ours: configuration of this run.
        theirs: configuration in run.json.
        prefix: of the names.

    Returns:
        names in order of appearance; those in ``NOT_COMPARED`` are passed over, within lists too.
    """
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return _differing_items(ours, theirs, prefix)
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [prefix]
    names = [name for name in dict.fromkeys([*ours, *theirs]) if name not in NOT_COMPARED]
    found = []
    for name in names:
        dotted = f"{prefix}.{name}" if prefix else name
        if name in ours and name in theirs:
            found += differing_keys(ours[name], theirs[name], dotted)
        else:
            found.append(dotted)
    return found


def _differing_items(ours: list[Json], theirs: list[Json], prefix: str) -> list[str]:
    """The same for two lists of one length; plain items have no name but the list's."""
    found: list[str] = []
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        nested = isinstance(one, dict | list)
        found += differing_keys(one, other, f"{prefix}[{index}]" if nested else prefix)
    return list(dict.fromkeys(found))


def environment() -> dict[str, Json]:
    """Versions, git commit, command and time: what run.json says beside the configuration."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in RECORDED_PACKAGES},
    }


def git_commit() -> str | None:
    """The commit of this package's own checkout, with ``+`` if tracked files were changed.

    None if the package was installed without its repository, or git is not there.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    """Output of a git command."""
    command = ["git", "-C", str(root), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()


def _version(name: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def read_run_record(path: Path) -> dict[str, Json]:
    """Read run.json; empty if there is none.

    Raises:
        ConfigurationError: if the file is not a run record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read as a run record ({error}): use another out, or --override"
        raise ConfigurationError(msg) from error
    if not isinstance(record, dict) or "config" not in record:
        msg = f"{path} has no config: use another out, or --override"
        raise ConfigurationError(msg)
    return record


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that no reader meets half of it."""
    # A name of its own: several runs may write config.yaml of one folder at once.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
