"""How fast seeds are read, dialect by dialect, and whether a prediction ever waits for data.

`python -m datamodules.speed seeds` and `python -m datamodules.speed wait` print what
docs/sources.md quotes.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datamodules.classes import read_class_list
from datamodules.convert import COCO_FILE
from datamodules.seed_files import open_seeds, write_seed
from datamodules.seed_files.coco_writing import CocoWriter
from datamodules.seed_files.writing import WRITABLE, suffix

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from datamodules.base import SeedDataModule

CLASS_IDS = (3, 15)
BACKGROUND = 0.5


@dataclass(frozen=True)
class ReadingSpeed:
    """One dialect.

    Attributes:
        dialect: its name.
        seeds_per_second: seeds decoded, checked and made into tensors, in a second of one core.
        bytes_per_image: on disk.
    """

    dialect: str
    seeds_per_second: float
    bytes_per_image: int


def example(index: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """Two smooth maps ``(2, H, W)`` with flat grounds, as activation maps have them."""
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
    wave = [np.sin(rows / (30 + index + 9 * k)) * np.cos(columns / (41 + index)) for k in range(2)]
    return np.asarray(np.clip(np.stack(wave), 0, 1), dtype=np.float32)


def reading_speed(
    dialect: str, count: int = 40, size: tuple[int, int] = (375, 500)
) -> ReadingSpeed:
    """Write seeds of a dialect into a temporary folder, then time the reading of all of them.

    The files come from the operating system's cache: this is the decoding, not the disk.

    Args:
        dialect: one that can be written, or ``coco``.
        count: how many images.
        size: height and width.
    """
    classes = read_class_list("voc")
    names = [f"{index:06d}" for index in range(1, count + 1)]
    with TemporaryDirectory() as folder:
        if dialect == "coco":
            source = Path(folder) / COCO_FILE
            writer = CocoWriter(source, classes, BACKGROUND, names)
            for index, name in enumerate(names):
                writer.write(name, CLASS_IDS, example(index, size))
            written = writer.close()
        else:
            source, written = Path(folder), 0
            for index, name in enumerate(names):
                path = source / f"{name}{suffix(dialect)}"  # type: ignore[arg-type]
                options: dict[str, Any] = {"classes": len(classes), "background": BACKGROUND}
                written += write_seed(path, CLASS_IDS, example(index, size), dialect, **options)  # type: ignore[arg-type]
        # Processor time, which other programs on the machine do not change. Opening counts too: a
        # COCO file is parsed there.
        began = time.process_time()
        seeds = open_seeds(source, classes)
        for name in names:
            seeds.read(name, size, None)
        seconds = time.process_time() - began
    return ReadingSpeed(dialect, count / seconds, written // count)


def seeds(count: int = 40, height: int = 375, width: int = 500) -> None:
    """Print a table of all dialects.

    Args:
        count: images per dialect.
        height: of the images, in pixels.
        width: of the images, in pixels.
    """
    print("| dialect | seeds per second | bytes per image |\n|---|---|---|")
    for dialect in (*WRITABLE, "coco"):
        row = reading_speed(dialect, count, (height, width))
        print(f"| {row.dialect} | {row.seeds_per_second:.0f} | {row.bytes_per_image} |")


def share_of_waiting(model: "pl.LightningModule", data: "SeedDataModule") -> float:
    """The share of a prediction's time that it waits for its next batch, in [0, 1].

    The first batch of each worker, which waits for it to start, is left out.

    Args:
        model: a module with ``predict_step``.
        data: of more batches than workers.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.profilers import SimpleProfiler

    left_out = max(1, data.num_workers)

    class Clock(pl.Callback):
        """When the last batch that is left out began."""

        began = 0.0

        def on_predict_batch_start(
            self,
            trainer: pl.Trainer,
            pl_module: pl.LightningModule,
            batch: object,
            batch_idx: int,
            dataloader_idx: int = 0,
        ) -> None:
            """Note the time."""
            if batch_idx == left_out - 1:
                self.began = time.monotonic()

    class Quiet(SimpleProfiler):
        """Measures without printing its table."""

        def describe(self) -> None:
            """Say nothing."""

    clock, profiler = Clock(), Quiet()
    trainer = pl.Trainer(
        accelerator="auto",
        callbacks=[clock],
        profiler=profiler,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(model, datamodule=data, return_predictions=False)
    total = time.monotonic() - clock.began
    waits: list[float] = profiler.recorded_durations["[_PredictionLoop].predict_next"][left_out:]
    return sum(waits) / total


def wait(count: int = 12, num_workers: int = 2) -> float:
    """Print the share of waiting of a refinement of scenes with the embedded generator.

    Args:
        count: scenes, one a batch.
        num_workers: drawing processes.
    """
    from datamodules.scenes import ScenesDataModule
    from g4seg_pl.module import G4SegModule
    from g4seg_pl.world.folders import GENERATOR

    data = ScenesDataModule(count=count, degraded="erode", batch_size=1, num_workers=num_workers)
    share = share_of_waiting(G4SegModule(str(GENERATOR)), data)
    print(f"waited for data: {100 * share:.2f} % of the time, with {num_workers} workers")
    return share


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"seeds": seeds, "wait": wait}, as_positional=False)
