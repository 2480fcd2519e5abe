"""Pictures of what a network is trained on and what it says: pure functions, and a callback."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from g4seg_pl.callbacks.palette import voc_palette
from g4seg_pl.segmentation.normalisation import denormalise

MARGIN = 2
WHITE = 255


def batch_picture(images: Tensor, *labels: Tensor, columns: int = 4) -> Image.Image:
    """Draw the pictures of a batch, each with its label maps to its right.

    Args:
        images: normalised ``(B, 3, H, W)``.
        labels: integer label maps ``(B, H, W)``, such as masks and predictions; 255 is drawn in
            the palette's pale colour.
        columns: groups of picture and maps in a row.
    """
    pictures = denormalise(images).permute(0, 2, 3, 1).cpu().numpy()
    maps = [colours(each.cpu().numpy()) for each in labels]
    groups = [np.concatenate(parts, axis=1) for parts in zip(pictures, *maps, strict=True)]
    return Image.fromarray(_grid(groups, columns))


def colours(labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the VOC colours ``(..., 3)`` of label values ``(...)``."""
    table = np.array(voc_palette(), np.uint8).reshape(-1, 3)
    return table[labels.astype(np.uint8)]


def _grid(tiles: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Tiles of one size on white, with margins."""
    height, width = (side + MARGIN for side in tiles[0].shape[:2])
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    canvas = np.full((rows * height - MARGIN, columns * width - MARGIN, 3), WHITE, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * height, index % columns * width
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return canvas


class PictureLogger(Callback):
    """Give the loggers pictures: the first training batch, and validation pictures by epoch.

    TensorBoard and W&B get them as such; with a CSV logger they become PNG files in its folder.

    Args:
        count: pictures of each kind.
        every_n_epochs: between validation pictures.
    """

    def __init__(self, count: int = 4, every_n_epochs: int = 1) -> None:
        super().__init__()
        self.count = count
        self.every_n_epochs = every_n_epochs

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show the first batch of the run: pictures and masks as the network gets them."""
        if trainer.global_step == 0 and batch_idx == 0 and trainer.is_global_zero:
            images, masks = (batch[name][: self.count] for name in ("image", "mask"))
            log_picture(trainer, "train/batch", batch_picture(images, masks))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the first pictures with truth and prediction."""
        due = trainer.current_epoch % self.every_n_epochs == 0
        rest = self.count - batch_idx * len(batch["image"])
        if not due or rest <= 0 or trainer.sanity_checking or not trainer.is_global_zero:
            return
        images, truth = (batch[name][:rest] for name in ("image", "mask"))
        prediction = torch.as_tensor(outputs)[:rest]
        log_picture(trainer, f"val/{batch_idx}", batch_picture(images, truth, prediction))


def log_picture(trainer: pl.Trainer, name: str, picture: Image.Image) -> None:
    """Hand a picture to every logger that can take one."""
    for logger in trainer.loggers:
        match logger:
            case TensorBoardLogger():
                pixels = np.asarray(picture)
                logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")
            case WandbLogger():
                logger.log_image(name, [picture], step=trainer.global_step)
            case CSVLogger():
                path = Path(logger.log_dir) / "pictures" / f"{name}_{trainer.global_step:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
