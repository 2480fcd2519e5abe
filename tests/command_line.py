"""The issue's own command line on the fake VOC tree, for tests that run it."""

import json
import os
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs" / "refine" / "voc_clip_es.yaml"


def words(command: str, model: Path, out: str, *more: str) -> list[str]:
    """The arguments of `predict` or `test`, relative to the folder above VOCdevkit."""
    given = [command, "-c", str(CONFIG), "--data.root", "VOCdevkit/VOC2012"]
    given += ["--data.seeds", "cam_out", "--model.model", str(model), "--out", out]
    return [*given, "--trainer.accelerator", "cpu", "--data.num_workers", "0", *more]


def environment() -> dict[str, str]:
    """This process's environment, one thread, our packages importable from anywhere."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def masks(out: Path) -> dict[str, bytes]:
    """The label files by name."""
    return {path.name: path.read_bytes() for path in sorted((out / "masks").glob("*.png"))}


def records(out: Path) -> list[dict[str, Any]]:
    """All records of a folder."""
    files = sorted(out.glob("records.*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def scores(out: Path) -> dict[str, Any]:
    """What `test` wrote."""
    content: dict[str, Any] = json.loads((out / "test.json").read_text())
    return content
