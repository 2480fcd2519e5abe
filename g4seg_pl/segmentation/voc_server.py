"""Predictions as the VOC evaluation server takes them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from g4seg_pl.callbacks.output_folder import (
    require_file_name,
    write_atomically,
    write_bytes_atomically,
)
from g4seg_pl.callbacks.palette import label_image
from g4seg_pl.callbacks.writer import MaskWriter
from g4seg_pl.segmentation.label_folder import LabelFolder
from g4seg_pl.types import RefinedMask


class VOCServerWriter(BasePredictionWriter):
    """Write ``OUT/results/VOC2012/Segmentation/<competition>_<split>_cls/<id>.png``.

    Pack the folder ``results`` with tar and upload it. Files are indexed by label at the picture's
    own size; 255 does not occur. Images that ``MaskWriter`` leaves out, for an earlier run had
    finished them, are taken from its folder.

    Args:
        out: folder that ``results`` is made in.
        competition: ``comp5`` for networks trained on VOC alone, ``comp6`` for others, which
            includes any that saw ImageNet or COCO.
        split: of the pictures.
    """

    def __init__(
        self, out: str | Path, competition: Literal["comp5", "comp6"] = "comp6", split: str = "test"
    ) -> None:
        super().__init__(write_interval="batch")
        self.out = Path(out)
        self.competition, self.split = competition, split

    @property
    def folder(self) -> Path:
        """Where the files go."""
        name = f"{self.competition}_{self.split}_cls"
        return self.out / "results" / "VOC2012" / "Segmentation" / name

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Sequence[RefinedMask],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the batch's label files."""
        for mask in prediction:
            require_file_name(mask.image_id)
            image = label_image(mask.label.numpy())
            write_atomically(self._path(mask.image_id), partial(image.save, format="PNG"))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Add the label files of images that an earlier run had finished."""
        if stage != "predict" or not trainer.is_global_zero:
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for writer in callbacks:
            if isinstance(writer, MaskWriter) and writer.skipped:
                labels = LabelFolder(writer.out, "out")
                for image_id in writer.skipped:
                    content = labels.mask_file(image_id).read_bytes()
                    write_bytes_atomically(self._path(image_id), content)

    def _path(self, image_id: str) -> Path:
        return self.folder / f"{image_id}.png"
