"""run.json: what made a folder of masks, and whether a run may be continued in it."""

import inspect
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

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


def describe(value: object) -> Json:
    """What an argument or a configured object is, in terms JSON can hold.

    Objects are described as jsonargparse would write them: the class path and the arguments of
    ``__init__``, read from the attributes of the same names.

    Args:
        value: anything that a configuration may hold.
    """
    match value:
        case Enum():
            return value.name
        case None | bool() | int() | float() | str():
            return value
        case Path():
            return str(value)
        case Mapping():
            return {str(key): describe(item) for key, item in value.items()}
        case set() | frozenset():
            return sorted(describe(item) for item in value)
        case Sequence():
            return [describe(item) for item in value]
    arguments = {name: describe(item) for name, item in init_arguments(value).items()}
    return {"class_path": class_path(value), "init_args": arguments}


def init_arguments(value: object) -> dict[str, object]:
    """The arguments an object was made with, as far as it kept them under their own names.

    An object that cannot keep them so may have a method ``configuration`` that returns them; a
    Lightning module's saved hyperparameters count too.
    """
    if hasattr(value, "configuration"):
        return dict(value.configuration())
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    saved = getattr(value, "hparams", {})
    found = {}
    for name in inspect.signature(type(value)).parameters:
        if hasattr(value, name):
            found[name] = getattr(value, name)
        elif name in saved:
            found[name] = saved[name]
    return found


def class_path(value: object) -> str:
    """Where the class of an object is imported from."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


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
