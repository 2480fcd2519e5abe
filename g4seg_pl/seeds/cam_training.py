"""Pictures and batches for training the classifier behind class activation maps."""

from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from g4seg_pl.features.base import normalise
from g4seg_pl.seeds.base import resize_picture
from g4seg_pl.seeds.groupvit import IMAGENET_MEAN, IMAGENET_STD
from g4seg_pl.types import FailedSample, Sample


def training_picture(
    sample: Sample, crop: int, longer_side: tuple[int, int]
) -> Float[Tensor, "1 3 c c"]:
    """Return the image resized, mirrored and cropped at random, normalised, zeros around it.

    Args:
        sample: the image.
        crop: side of the result, in pixels.
        longer_side: the range its longer side is drawn from.
    """
    longer = int(torch.randint(longer_side[0], longer_side[1] + 1, ()))
    height, width = sample.image.shape[1:]
    scale = longer / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    picture = resize_picture(sample.image, size, Image.Resampling.BICUBIC)
    picture = normalise(picture, IMAGENET_MEAN, IMAGENET_STD)
    if torch.rand(()) < 0.5:
        picture = picture.flip(3)
    rows, from_top = _random_window(size[0], crop)
    columns, from_left = _random_window(size[1], crop)
    part = picture[:, :, rows, columns]
    right, bottom = crop - part.shape[3] - from_left, crop - part.shape[2] - from_top
    return functional.pad(part, (from_left, right, from_top, bottom))


class TrainingItems(pl.LightningDataModule):
    """A data set's items in random order, for ``Trainer.fit`` with :class:`g4seg_pl.seeds.cam.Cam`.

    Args:
        data: one of datamodules, with labels.
        batch_size: images a step.
    """

    def __init__(self, data: pl.LightningDataModule, batch_size: int = 16) -> None:
        super().__init__()
        self.data: Any = data
        self.batch_size = batch_size

    def setup(self, stage: str | None = None) -> None:
        """List the items."""
        self.data.setup(stage)

    @property
    def class_list(self) -> Any:
        """The data set's class list."""
        return self.data.class_list

    def train_dataloader(self) -> DataLoader[Sample | FailedSample]:
        """All items, in another order each epoch."""
        return DataLoader(
            self.data.predict_dataloader().dataset,
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=self.data.num_workers,
            collate_fn=list,
            drop_last=len(self.data.items) > self.batch_size,
        )

    def transfer_batch_to_device(
        self, batch: list[Sample | FailedSample], device: torch.device, dataloader_idx: int
    ) -> list[Sample | FailedSample]:
        """Leave the batch where it is: Lightning's own transfer refuses frozen dataclasses."""
        return batch


def _random_window(length: int, crop: int) -> tuple[slice, int]:
    """What of a side is taken, and where in the crop it goes."""
    if length >= crop:
        start = int(torch.randint(0, length - crop + 1, ()))
        return slice(start, start + crop), 0
    return slice(0, length), int(torch.randint(0, crop - length + 1, ()))
