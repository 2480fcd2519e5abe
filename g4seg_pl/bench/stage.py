"""The contestant ``g4seg``: the whole stage, from image and seed files to written PNGs."""

import io
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from datamodules.base import SeedDataModule
from g4seg_pl.bench.models import ModelFolders
from g4seg_pl.bench.timing import Spent, Stopwatch
from g4seg_pl.callbacks.writer import MaskWriter
from g4seg_pl.core.steps import Correspondence, UpdateStep
from g4seg_pl.features.transformers_clip import TransformersClipFeatures
from g4seg_pl.module import G4SegModule
from g4seg_pl.types import FailedSample, G4SegError, RefinedMask


class TimedWriter(MaskWriter):
    """The writer, with a clock from the loop's start to the last written file."""

    spent: Spent

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start: models are loaded and on their device, no file of the data is open."""
        self._watch = Stopwatch(pl_module.device)
        self._watch.start()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop when the last file is written."""
        self._collect(leave=0)
        self.spent = self._watch.read()


class Keep(Callback):
    """Keeps what was predicted, for comparisons."""

    def __init__(self) -> None:
        self.masks: list[RefinedMask] = []

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Keep a batch.

        Raises:
            G4SegError: an image failed; its time would be worth nothing.
        """
        for item in outputs:
            if isinstance(item, FailedSample):
                msg = f"benchmark image {item.image_id}: {item.error}"
                raise G4SegError(msg)
            self.masks.append(item)


class Stage:
    """g4seg as a user runs it, with the paper's update and CLIP features.

    Attributes:
        module: the model; loaded by the first run and kept.
    """

    def __init__(
        self,
        models: ModelFolders,
        device: torch.device,
        dtype: torch.dtype,
        *,
        masks_per_pass: int = 8,
        steps: Sequence[UpdateStep] | None = None,
    ) -> None:
        """Prepare a module; nothing is loaded yet.

        Args:
            models: generator and image encoder.
            device: where to run.
            dtype: number format of the weights.
            masks_per_pass: masks that enter a network at once.
            steps: the paper's update if None.
        """
        self.device = device
        self.module = G4SegModule(
            str(models.generator),
            update=[Correspondence()] if steps is None else list(steps),
            features=TransformersClipFeatures(str(models.clip)),
            dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
            masks_per_pass=masks_per_pass,
        )

    def limit(self, masks_per_pass: int) -> None:
        """Change how many masks enter a network at once.

        Args:
            masks_per_pass: at most.
        """
        self.module.masks_per_pass = masks_per_pass
        if self.module._refiner is not None:
            self.module._refiner.masks_per_pass = masks_per_pass

    def run(self, data: SeedDataModule, out: Path) -> tuple[Spent, list[RefinedMask]]:
        """Predict; return the loop's time, last file written, and the masks.

        Args:
            data: images and seeds.
            out: folder of the masks, which are done anew.
        """
        writer, keep = TimedWriter(out, override=True), Keep()
        predict(self.module, data, self.device, [keep, writer])
        return writer.spent, keep.masks


def predict(
    module: pl.LightningModule,
    data: SeedDataModule,
    device: torch.device,
    callbacks: Sequence[Callback],
    **trainer: Any,
) -> None:
    """Run Lightning's predict loop without a word.

    Args:
        module: the model.
        data: images and seeds.
        device: where to run.
        callbacks: the writer among them.
        trainer: further arguments of the ``Trainer``.
    """
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level, said = log.level, io.StringIO()
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(said):
            warnings.simplefilter("ignore")
            pl.Trainer(
                accelerator="gpu" if device.type == "cuda" else "cpu",
                devices=[device.index or 0] if device.type == "cuda" else 1,
                callbacks=list(callbacks),
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **trainer,
            ).predict(module, datamodule=data, return_predictions=False)
    finally:
        log.setLevel(level)
