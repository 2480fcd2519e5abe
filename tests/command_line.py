"""The README's command line on the fake VOC tree, for tests that run it."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from g4seg_pl.callbacks.tar_samples import id_of

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


def kill_when(
    ready: Callable[[], bool],
    folder: Path,
    arguments: Sequence[str],
    by: signal.Signals = signal.SIGKILL,
) -> int:
    """Start a run and end it, by default with no chance to clean up, once something is there.

    The signal goes to all processes of the run, as clusters send it.

    Returns:
        its exit status.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "g4seg_pl.main", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not ready():
        time.sleep(0.002)
    if process.poll() is None:
        os.killpg(process.pid, by)
    return process.wait(120)


def masks(out: Path) -> dict[str, bytes]:
    """The label files by name."""
    return {path.name: path.read_bytes() for path in sorted((out / "masks").glob("*.png"))}


def tar_masks(out: Path) -> dict[str, bytes]:
    """The label files in all tars by the names they have in the folder form, each once."""
    found: dict[str, bytes] = {}
    for path in sorted((out / "masks").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                name = f"{id_of(key)}.{suffix}"
                assert name not in found
                stream = tar.extractfile(member)
                assert stream is not None
                found[name] = stream.read()
    ids = [json.loads(content)["id"] for name, content in found.items() if name.endswith("json")]
    labels = {name: content for name, content in found.items() if name.endswith(".png")}
    assert sorted(f"{image_id}.png" for image_id in ids) == sorted(labels)
    return labels


def records(out: Path) -> list[dict[str, Any]]:
    """All records of a folder."""
    files = sorted(out.glob("records.*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def scores(out: Path) -> dict[str, Any]:
    """What `test` wrote."""
    content: dict[str, Any] = json.loads((out / "test.json").read_text())
    return content
