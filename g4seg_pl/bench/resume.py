"""How soon a run over finished images begins, and ends."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from datamodules.folder import FolderDataModule
from g4seg_pl.bench.rows import Bar, Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.stage import Stage, predict
from g4seg_pl.bench.timing import Spent, Stopwatch
from g4seg_pl.callbacks.tar_writer import TarSize, TarWriter
from g4seg_pl.callbacks.writer import MaskWriter

IMAGES = 100_000
IMAGES_A_TAR = 1000


class Begun(Callback):
    """Notes when everything before the model's loading was done; to be listed last."""

    spent: Spent

    def __init__(self, device: torch.device) -> None:
        self.watch = Stopwatch(device)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note the time."""
        self.spent = self.watch.read()


def resume(setting: Setting) -> Iterator[Row]:
    """Yield the time a resumed run needs until its model would load, over files and over tars.

    Args:
        setting: place; the models' size does not matter.
    """
    module = Stage(setting.models, torch.device("cpu"), torch.float32).module
    yield _row(setting, module, "resume: start", None)
    yield _row(setting, module, "resume: start, tars", IMAGES_A_TAR)


def _row(setting: Setting, module: pl.LightningModule, name: str, tar: int | None) -> Row:
    """Time runs over finished images in files, or in tars of so many."""
    out = setting.out("resumed" if tar is None else "resumed_tars")
    data, writer = _data(setting), partial(MaskWriter, out, tar=tar)
    _run(module, data(), writer(), limit_predict_batches=0)
    _finish(out, [item.image_id for item in _listed(data())], tar)
    runs = [_run(module, data(), writer()) for _ in range(min(3, setting.rounds))]
    start, end = (min(each, key=lambda spent: spent.seconds) for each in zip(*runs, strict=True))
    where = "label files" if tar is None else f"images in tars of {tar}"
    detail = (
        f"{IMAGES} {where} and records; until the model would load, imports not counted; "
        f"fastest of {len(runs)}; by the clock {start.wall:.3g} s. A run with nothing left ends "
        f"after {end.seconds:.3g} s"
    )
    return Row(name, start.seconds, "s", Bar(3), detail)


def _data(setting: Setting) -> Any:
    """Make DataModules of a list of many images, of which no file exists."""
    inputs = setting.inputs
    split = setting.folder / "many.txt"
    split.write_text("".join(f"many{index:06d}.png\n" for index in range(IMAGES)), encoding="utf-8")
    folder = inputs.folder
    return lambda: FolderDataModule(
        folder / "images", folder / "seeds", folder / "classes.txt", split=str(split), num_workers=0
    )


def _listed(data: FolderDataModule) -> tuple[Any, ...]:
    data.setup()
    return data.items


def _finish(out: Path, ids: list[str], tar: int | None) -> None:
    """Make files and records as a finished run leaves them; empty pictures serve."""
    record = {"status": "done", "time": "2026-01-01T00:00:00.000+00:00"}
    lines = [json.dumps({"id": name} | record) for name in ids]
    (out / "records.rank0.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if tar is None:
        for name in ids:
            (out / "masks" / f"{name}.png").touch()
        return
    tars = TarWriter(out / "masks", "rank0", TarSize(images=tar))
    for name, line in zip(ids, lines, strict=True):
        tars.add(name, {"png": b"", "json": line.encode()})
    tars.close()


def _run(
    module: pl.LightningModule, data: FolderDataModule, writer: MaskWriter, **trainer: Any
) -> tuple[Spent, Spent]:
    """Run to the end; return the time until the work would have begun, and until the end."""
    device = torch.device("cpu")
    begun = Begun(device)
    with begun.watch as watch:
        predict(module, data, device, [writer, begun], **trainer)
    return begun.spent, watch.spent
