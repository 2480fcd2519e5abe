"""Whether the memory of a prediction stays flat over many images."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from datamodules.folder import FolderDataModule
from g4seg_pl.bench.inputs import MOST_CLASSES, Inputs, write_inputs
from g4seg_pl.bench.models import write_models
from g4seg_pl.bench.rows import Bar, Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.sizes import TINY
from g4seg_pl.bench.stage import Stage, predict
from g4seg_pl.callbacks.writer import MaskWriter

SHAPES = ((64, 64), (48, 64), (64, 40), (57, 71))
"""Heights and widths of the images in pixels: memory is asked for in many sizes."""

TARS = 4
BATCH = 4
LIMIT = 16
"""MiB. One label map of each image kept in memory would be 30 for 10,000 images."""

SIDE = 64
"""Working size in pixels: of half the benchmark's usual side, for the number of images."""


class WatchMemory(Callback):
    """Notes the memory of this process and of its workers after every batch.

    Attributes:
        readings: bytes in the process, a GPU's memory included, and in its workers, one pair a
            batch.
    """

    def __init__(self) -> None:
        self.readings: list[tuple[int, int]] = []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the memory."""
        workers = (child.pid for child in active_children())
        in_workers = sum(resident_bytes(pid) for pid in workers if pid is not None)
        on_device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        self.readings.append((resident_bytes(os.getpid()) + on_device, in_workers))

    def tenths(self) -> list[tuple[float, float]]:
        """Medians over each tenth of the batches: memory goes up and down within a batch."""
        count = len(self.readings)
        parts = [self.readings[count * i // 10 : count * (i + 1) // 10] for i in range(10)]
        return [
            (median(own for own, _ in part), median(worker for _, worker in part)) for part in parts
        ]


def memory(setting: Setting) -> Iterator[Row]:
    """Yield by how much a run grows after its first tenth.

    Args:
        setting: place and number of images; the models are tiny, whatever the size, since images
            are to be many.
    """
    count = setting.memory_images
    name = f"memory: growth over {count} images"
    if not Path("/proc/self/statm").is_file():
        yield Row(name, None, "MiB", Bar(LIMIT), "needs Linux, where resident memory can be read")
        return
    small = replace(TINY, side=SIDE, unet=TINY.unet | {"sample_size": SIDE // 4})
    stage = Stage(write_models(setting.folder / "memory", small), setting.device, torch.float32)
    data = _many(setting.folder / "memory" / "inputs", count)
    watch = WatchMemory()
    writer = MaskWriter(setting.out("memory"), override=True)
    predict(stage.module, data, setting.device, [writer, watch])
    tenths = watch.tenths()
    own, worker = ((tenths[-1][which] - tenths[1][which]) / 2**20 for which in (0, 1))
    together = ", ".join(f"{sum(each) / 2**20:.0f}" for each in tenths)
    detail = (
        f"resident memory in the last tenth of the batches over that in the second, medians; "
        f"images from {TARS} tars, seeds from a folder, {BATCH} a batch, 1 worker: the process "
        f"{own:+.1f}, its worker {worker:+.1f}; both together in each tenth {together}"
    )
    yield Row(name, own + worker, "MiB", Bar(LIMIT), detail)


def resident_bytes(process: int) -> int:
    """Resident memory of a process on Linux.

    Args:
        process: its id.
    """
    pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _many(folder: Path, count: int) -> FolderDataModule:
    """Many images in tars, and their seeds in a folder: a few contents under many names."""
    templates = [
        write_inputs(folder / f"{height}x{width}", (height, width), MOST_CLASSES)
        for height, width in SHAPES
    ]
    names = {f"many{index:06d}": index for index in range(count)}
    (folder / "seeds").mkdir(exist_ok=True)
    for name, index in names.items():
        target = folder / "seeds" / f"{name}.npz"
        if not target.exists():
            target.hardlink_to(_file(templates, index, "seeds", ".npz"))
    for number in range(TARS):
        with tarfile.open(folder / f"images-{number}.tar", "w") as tar:
            for name, index in list(names.items())[number::TARS]:
                tar.add(_file(templates, index, "images", ".png"), f"{name}.png")
    return FolderDataModule(
        folder / f"images-{{0..{TARS - 1}}}.tar",
        folder / "seeds",
        templates[0].folder / "classes.txt",
        batch_size=BATCH,
        num_workers=1,
    )


def _file(templates: list[Inputs], index: int, part: str, suffix: str) -> Path:
    """One of the templates' files; shapes and numbers of classes take turns."""
    inputs = templates[index % len(templates)]
    name = list(inputs.counts)[index // len(templates) % MOST_CLASSES]
    return inputs.folder / part / f"{name}{suffix}"
