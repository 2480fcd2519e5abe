"""Two processes of one thread each against one, in images a second."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from statistics import median

import torch

from datamodules.folder import FolderDataModule
from g4seg_pl.bench.models import ModelFolders
from g4seg_pl.bench.rows import Bar, Row
from g4seg_pl.bench.setting import Setting, available_cores
from g4seg_pl.bench.stage import Stage

_STAGE: dict[str, Stage] = {}


def processes(setting: Setting) -> Iterator[Row]:
    """Yield the throughput of two processes over that of one.

    Args:
        setting: size and rounds; it is about the CPU, whatever the device.
    """
    name = "processes: two / one, images per second"
    bar = Bar(1.8, at_least=True)
    if available_cores() < 2:
        yield Row(name, None, "×", bar, "needs two cores; this process may use one")
        return
    work = [
        _Work(setting.models, setting.inputs.data(), setting.dtype, setting.out(f"process{rank}"))
        for rank in range(2)
    ]
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, torch.set_num_threads, (1,)) as pool:
        # Both load their models and run once; each task waits until the other process has one.
        _together(pool, work)
        _together(pool, work)
        ratios, speeds = [], []
        for _ in range(setting.rounds):
            one, two = _together(pool, work[:1]), _together(pool, work)
            ratios.append(two / one)
            speeds.append(one)
    detail = (
        f"each its share of the images, one thread; one process does {median(speeds):.3g} images a "
        f"second; {len(ratios)} pairs from {min(ratios):.3g} to {max(ratios):.3g}"
    )
    yield Row(name, median(ratios), "×", bar, detail)


@dataclass(frozen=True)
class _Work:
    """All that a process needs."""

    models: ModelFolders
    data: FolderDataModule
    dtype: torch.dtype
    out: Path


def _together(pool: Pool, work: Sequence[_Work]) -> float:
    """Images per second of so many processes at once, by the wall time until all are done."""
    # Far enough ahead that both processes have fetched their task before either starts.
    start = time.time() + 0.5
    tasks = [pool.apply_async(_work, (each, start)) for each in work]
    done = [task.get() for task in tasks]
    return sum(images for images, _ in done) / (max(end for _, end in done) - start)


def _work(work: _Work, start: float) -> tuple[int, float]:
    """In a process: refine all images; how many, and when it was done."""
    if "stage" not in _STAGE:
        _STAGE["stage"] = Stage(work.models, torch.device("cpu"), work.dtype)
    stage = _STAGE["stage"]
    time.sleep(max(0.0, start - time.time()))
    _, masks = stage.run(work.data, work.out)
    return len(masks), time.time()
