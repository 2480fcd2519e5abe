"""How long a prediction waits for its next batch, and for the writer."""

import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import SimpleProfiler

from g4seg_pl.bench.rows import Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.stage import Stage, TimedWriter, predict

NEXT_BATCH = "[_PredictionLoop].predict_next"
FULL_SIZE_IMAGES = 4


class Quiet(SimpleProfiler):
    """Measures without printing its table."""

    def describe(self) -> None:
        """Say nothing."""


class WatchedWriter(TimedWriter):
    """The writer, with the time it keeps the loop: handing over, and waiting at the end."""

    kept = 0.0

    def write_on_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Hand over a batch."""
        began = time.perf_counter()
        super().write_on_batch_end(*args, **kwargs)
        self.kept += time.perf_counter() - began

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the last file."""
        began = time.perf_counter()
        super().on_predict_end(trainer, pl_module)
        self.kept += time.perf_counter() - began


def waiting(setting: Setting) -> Iterator[Row]:
    """Yield the shares of a run's wall time, the first batch's wait left out.

    Args:
        setting: size and place; at full size four images serve.
    """
    names = tuple(setting.inputs.counts)
    names = names[:FULL_SIZE_IMAGES] if setting.size.full else names
    stage = Stage(setting.models, setting.device, setting.dtype)
    stage.run(setting.inputs.data(names[:1]), setting.out("waiting"))
    writer, profiler = WatchedWriter(setting.out("waiting_all"), override=True), Quiet()
    data = setting.inputs.data(names, num_workers=1)
    predict(stage.module, data, setting.device, [writer], profiler=profiler)
    first, *waits = profiler.recorded_durations[NEXT_BATCH]
    total = writer.spent.wall - first
    held = f"{len(names)} images, one a batch, 1 worker; {total:.3g} s without the first batch's"
    waited = 100 * sum(waits) / total
    yield Row("waiting: for data", waited, "%", setting.bar(5), f"{held} {first:.2g} s")
    kept = 100 * writer.kept / total
    yield Row("waiting: for the writer", kept, "%", setting.bar(5), f"{held}; last file included")
