"""``g4seg bench``: rows, a table, JSON and an exit status."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from json import dumps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from g4seg_pl.bench.rows import Row, failing, table, write_rows
from g4seg_pl.types import ConfigurationError

if TYPE_CHECKING:
    import torch

# A part's rows begin with its name and a colon.
PARTS = {
    "injection": "g4seg_pl.bench.injection:injection",
    "match": "g4seg_pl.bench.match:match",
    "resume": "g4seg_pl.bench.resume:resume",
    "waiting": "g4seg_pl.bench.waiting:waiting",
    "steps": "g4seg_pl.bench.steps:steps",
    "decoder": "g4seg_pl.bench.decoder:decoder",
    "cache": "g4seg_pl.bench.cache:cache",
    "processes": "g4seg_pl.bench.processes:processes",
    "memory": "g4seg_pl.bench.memory:memory",
    "contest": "g4seg_pl.bench.contest:contest",
    "throughput": "g4seg_pl.bench.throughput:throughput",
    "compile": "g4seg_pl.bench.compile:compile_blocks",
}
"""Parts of the benchmark by name; each yields rows, later ones in place of earlier ones."""

# It needs a C++ compiler, and minutes of it.
ONLY_BY_NAME = {"compile"}

COMMANDS = {
    "": "g4seg_pl.bench.command:bench",
    "scaling": "g4seg_pl.bench.scaling:scaling",
    "profile": "g4seg_pl.bench.profiling:profiled",
}

FEWEST_IMAGES = 3
FEWEST_FOR_MEMORY = 100


def main(words: Sequence[str]) -> int:
    """Run ``g4seg bench``, ``g4seg bench scaling`` or ``g4seg bench profile``.

    Args:
        words: the arguments.

    Returns:
        0, or 1 if a bar of this machine fails.
    """
    from jsonargparse import auto_cli

    words = _as_list(list(words), "--only")
    name = words[0] if words and words[0] in COMMANDS else ""
    status: int = auto_cli(
        _load(COMMANDS[name]),
        args=words[1:] if name else words,
        prog=f"g4seg bench {name}".strip(),
        as_positional=False,
    )
    return status


def bench(
    size: Literal["tiny", "sd21"] = "tiny",
    json: Path | None = None,
    only: list[str] | None = None,
    device: str | None = None,
    images: int = 8,
    plain_images: int | None = None,
    rounds: int = 5,
    memory_images: int = 1000,
    work: Path | None = None,
) -> int:
    """Time and weigh g4seg against the bare networks and against a plain reading of the paper.

    `g4seg bench scaling` shows cost against classes, grids, sizes, batches and processes, and
    `g4seg bench profile` where the time of an update goes.

    Args:
        size: of the models, whose weights are random: tiny for tests, or Stable Diffusion 2.1's.
        json: file for the rows, rewritten as they come.
        only: parts or rows; all but `compile` if not given.
        device: such as cuda; a GPU if there is one.
        images: of the contest between floor, g4seg and plain.
        plain_images: of these, those that plain refines too; all if tiny, else 1.
        rounds: repetitions of small measurements.
        memory_images: over how many images memory is watched, 100 or more.
        work: folder for models and outputs, kept; a temporary one if not given.

    Returns:
        0, or 1 if a bar that belongs to this size and machine fails.
    """
    from g4seg_pl.bench.setting import Setting
    from g4seg_pl.bench.sizes import SIZES

    chosen = parts_of(only)
    if images < FEWEST_IMAGES:
        msg = f"images is {images}: give {FEWEST_IMAGES} or more, one for each number of classes"
        raise ConfigurationError(msg)
    if memory_images < FEWEST_FOR_MEMORY:
        msg = f"memory_images is {memory_images}: give {FEWEST_FOR_MEMORY} or more"
        raise ConfigurationError(msg)
    few = (images if size == "tiny" else 1) if plain_images is None else plain_images
    found: dict[str, Row] = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) if work is None else work
        place = (SIZES[size], pick_device(device), folder.absolute())
        setting = Setting(*place, images, few, rounds, memory_images, tuple(only or ()))
        for part in chosen:
            for row in _load(PARTS[part])(setting):
                if part in setting.only or setting.wants(row.name):
                    found[row.name] = row
                    if json is not None:
                        write_rows(json, list(found.values()))
    rows = list(found.values())
    print(f"size {size}; {setting.machine}\n\n{table(rows)}")
    if failed := failing(rows):
        print(f"bars that fail: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parts_of(only: Sequence[str] | None) -> list[str]:
    """The parts that hold the rows asked for.

    Args:
        only: names of parts or rows; all if None or empty.

    Raises:
        ConfigurationError: a name belongs to no part.
    """
    if not only:
        return [part for part in PARTS if part not in ONLY_BY_NAME]
    wanted = {name.partition(":")[0] for name in only}
    if unknown := wanted - PARTS.keys():
        msg = (
            f"only: no part {', '.join(sorted(unknown))}; give {', '.join(PARTS)}, or a row of them"
        )
        raise ConfigurationError(msg)
    return [part for part in PARTS if part in wanted]


def pick_device(name: str | None) -> "torch.device":
    """The device asked for, or a GPU if there is one.

    Args:
        name: such as ``cpu`` or ``cuda``; None chooses.
    """
    from g4seg_pl.backbones.loading import place_of

    return place_of(name)


def _as_list(words: list[str], option: str) -> list[str]:
    """The values that follow an option as the one JSON list that the parser wants."""
    if option not in words:
        return words
    begin = words.index(option) + 1
    after = (i for i in range(begin, len(words)) if words[i].startswith("--"))
    end = next(after, len(words))
    return [*words[:begin], dumps(words[begin:end], ensure_ascii=False), *words[end:]]


def _load(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
