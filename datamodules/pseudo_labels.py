"""Refined masks to train on, ground truth to validate on."""

import copy
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from datamodules.base import SeedDataModule
from datamodules.classes import ClassList, read_class_list, require_same_classes
from datamodules.folder import FolderDataModule
from datamodules.items import Item, check_unique, take_shard
from datamodules.sampling import ProcessSampler, own_part
from datamodules.training_items import (
    CompactImages,
    MaskReader,
    TrainingImages,
    WholeImages,
    collate_compact,
    collate_whole,
)
from datamodules.workers import outlive_sigterm
from g4seg_pl.segmentation.augmentation import Augmentation, Augmenter
from g4seg_pl.segmentation.label_folder import LabelFolder
from g4seg_pl.segmentation.sampling import EpochSampler
from g4seg_pl.segmentation.soft_targets import reading_of
from g4seg_pl.types import ConfigurationError

_COMPACT = ("soft_planes", "soft_labels")  # see collate_compact


class PseudoLabelDataModule(LightningDataModule):
    """What `g4seg predict` wrote, as training data for any segmentation network.

    A training batch is `{"image": float (B, 3, S, S), "mask": long (B, S, S)}`, with `soft`, float
    `(B, C, S, S)`, if asked for; images are normalised by ImageNet's statistics, 255 is ignored.
    Soft maps get this form on their way to the device; without a Trainer that was given this
    DataModule, pass each batch of `train_dataloader` through `transfer_batch_to_device`.
    Validation and test batches have images at their own size and their `image_id`.

    Args:
        images: the data set whose split is trained on; its seeds are not needed.
        labels: the folder that `g4seg predict` wrote, with files or tars in it, or a folder of
            `<id>.png`; None trains on the ground truth.
        val: split of the same data set to validate on, all of it whatever list the training
            images are taken from, or a data set of its own; None has none.
        test: the same for test and predict; None takes what `val` says.
        soft: also read the soft maps, which some losses need.
        augmentation: of training pictures.
        batch_size: of training.
        val_batch_size: of validation, test and prediction; above 1 all sizes must be equal.
        num_workers: reading processes.
        seed: of order and augmentation, with the epoch.
        shard: `i/n` predicts the i-th of n equal parts, see docs/scale.md.
    """

    def __init__(
        self,
        images: SeedDataModule,
        labels: str | Path | None = None,
        val: str | SeedDataModule | None = "val",
        test: str | SeedDataModule | None = None,
        soft: bool = False,
        augmentation: Augmentation | None = None,
        batch_size: int = 10,
        val_batch_size: int = 1,
        num_workers: int = 4,
        seed: int = 0,
        shard: str | None = None,
    ) -> None:
        super().__init__()
        self.images, self.val, self.test = images, val, test
        self.shard = shard
        self.labels = None if labels is None else Path(labels).expanduser()
        self.soft = soft
        self.augmentation = augmentation or Augmentation()
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.num_workers, self.seed = num_workers, seed
        self._training: TrainingImages | None = None
        self._excluded: frozenset[str] = frozenset()
        # A resumed run may have fewer images left than processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @property
    def class_list(self) -> ClassList:
        """The foreground classes, those of the training images."""
        source = self.images.class_names or self.images.bundled_classes
        if source is None:
            message = (
                "data.images.class_names: None given, and this data set has no list of its own"
            )
            raise ConfigurationError(message)
        return read_class_list(source)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the label values from 0, the background, on."""
        return ("background", *self.class_list.names)

    @property
    def split(self) -> str:
        """What test and predict look at, for the record of a run."""
        return str(getattr(self._evaluated("test"), "split", None))

    def setup(self, stage: str | None = None) -> None:
        """Check that the files are there; no picture is opened.

        Raises:
            ConfigurationError: a split is missing, a training image has no mask or soft map, or
                the ground truth that is needed is not there.
        """
        if stage in (None, "fit"):
            self.use_labels(self.labels)
        if stage in (None, "fit", "validate") and self.val is not None:
            _require_truth(self._items(self._evaluated("val")), "val")
        if stage == "test":
            _require_truth(self._items(self._evaluated("test")), "test")
        if stage == "predict":
            self._predicted()

    def use_labels(self, labels: Path | None) -> None:
        """Train on the masks of a folder from the next epoch on, after checking them.

        Args:
            labels: the folder; None for the ground truth.

        Raises:
            ConfigurationError: see `setup`.
        """
        items = self._items(self.images)
        folder = None if labels is None else LabelFolder(labels)
        if folder is None:
            self._require_no_soft()
            _require_truth(items, "train")
            told = "data.labels is not given: training on the ground truth of the images"
            rank_zero_only(print)(told, file=sys.stderr, flush=True)
        else:
            require_same_classes(self.class_list, folder.root)
            ids = [item.image_id for item in items]
            folder.require(ids, getattr(self.images, "split", None), soft=self.soft)
            if self.soft:
                reading_of(folder.record)
        if self._training is None:
            reader = self._reader(self.images)
            self._training = TrainingImages(items, reader, Augmenter(self.augmentation))
        self._training.reader.folder = folder

    @property
    def training_images(self) -> TrainingImages:
        """The training set; it may also be read without a Trainer, after `setup("fit")`."""
        if self._training is None:
            self.setup("fit")
        if self._training is None:
            message = "data: nothing was set up; call setup('fit')"
            raise ConfigurationError(message)
        return self._training

    @property
    def items(self) -> tuple[Item, ...]:
        """What predict looks at in this shard, less what is finished."""
        return tuple(item for item in self._predicted() if item.image_id not in self._excluded)

    def exclude(self, ids: Collection[str]) -> None:
        """Leave out of predict what is finished; what an earlier call left out counts again."""
        self._excluded = frozenset(ids)

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented batches; the last is left out if it is smaller than the others."""
        images = self.training_images
        sampler = EpochSampler(images, self.seed)
        if (trainer := self.trainer) is not None:
            where = (trainer.world_size, trainer.global_rank)
            sampler = EpochSampler(images, self.seed, lambda: trainer.global_step, *where)
        return DataLoader(
            CompactImages(images),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=collate_compact,
            num_workers=self.num_workers,
            worker_init_fn=outlive_sigterm,
            pin_memory=torch.cuda.is_available(),
            # Its own, or starting an epoch would draw from the generator that dropout draws from.
            generator=torch.Generator().manual_seed(self.seed),
            # A last batch of one picture would break batch norm.
            drop_last=len(sampler) >= self.batch_size,
        )

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch, and give its soft maps their place among all labels there.

        A dictionary or list of batches, as combined loaders give, is gone through.

        Here, since ``(B, 81, S, S)`` of COCO would fill the memory that workers share; not after
        the transfer, since that hook is where a user's own module augments.
        """
        return self._placed(super().transfer_batch_to_device(batch, device, dataloader_idx))

    def _placed(self, batch: Any) -> Any:
        """A batch, or several in one, whose `soft_planes` have become `soft`."""
        kind = type(batch)
        if kind is list or kind is tuple:
            return kind(map(self._placed, batch))
        if kind is not dict:
            return batch
        if "soft_planes" not in batch:
            return {name: self._placed(each) for name, each in batch.items()}
        kept = {name: each for name, each in batch.items() if name not in _COMPACT}
        soft = self.training_images.place(batch["soft_labels"], batch["soft_planes"])
        return kept | {"soft": soft}

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Whole pictures with truth; no loader if there is no validation data."""
        return [] if self.val is None else self._whole(self._evaluated("val"), with_truth=True)

    def test_dataloader(self) -> DataLoader[Any]:
        """Whole pictures with truth."""
        return self._whole(self._evaluated("test"), with_truth=True)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Whole pictures; of several processes each gets its own part."""
        sampler = own_part(self.trainer, self.items)
        return self._whole(self._evaluated("test"), self.items, sampler, with_truth=False)

    def _whole(
        self,
        source: SeedDataModule,
        items: Sequence[Item] | None = None,
        sampler: ProcessSampler | None = None,
        *,
        with_truth: bool,
    ) -> DataLoader[Any]:
        listed = self._items(source) if items is None else items
        processes = 1 if self.trainer is None or sampler is not None else self.trainer.world_size
        reader = self._reader(source)
        images = WholeImages(listed, reader, with_truth=with_truth, multiple=processes)
        return DataLoader(
            images,
            batch_size=self.val_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=outlive_sigterm,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate_whole,
        )

    def _evaluated(self, purpose: str) -> SeedDataModule:
        """The data set of validation or test."""
        argument = "val" if purpose == "val" or self.test is None else "test"
        named = self.val if argument == "val" else self.test
        if named is None:
            message = f"data.{purpose}: no data to look at; give the name of a split"
            raise ConfigurationError(message)
        if isinstance(named, SeedDataModule):
            return named
        if not hasattr(self.images, "split"):
            message = f"data.{purpose}: {type(self.images).__name__} has no splits; give a data set"
            raise ConfigurationError(message)
        if isinstance(self.images, FolderDataModule) and not Path(named).expanduser().is_file():
            message = (
                f"data.{argument}: {named!r} is no list file, which FolderDataModule's splits are; "
                f"give one, a data set of its own, or {argument}=None (null) for none"
            )
            raise ConfigurationError(message)
        other = copy.copy(self.images)
        other.split = named
        if hasattr(other, "list_file"):
            other.list_file = None  # it lists images of the split that is trained on
        return other

    def _reader(self, source: SeedDataModule) -> MaskReader:
        return MaskReader(self.class_list, source.orientation, source.truth_options, soft=self.soft)

    def _predicted(self) -> list[Item]:
        return take_shard(self._items(self._evaluated("test")), self.shard)

    @staticmethod
    def _items(source: SeedDataModule) -> list[Item]:
        items = source.list_items()
        check_unique(items)
        return take_shard(items, source.shard)

    def _require_no_soft(self) -> None:
        if self.soft:
            message = "data.soft: ground truth has no soft maps; give labels, or set soft to false"
            raise ConfigurationError(message)


def _require_truth(items: Sequence[Item], purpose: str) -> None:
    """Refuses a split without ground truth.

    Raises:
        ConfigurationError: names what is missing.
    """
    missing = [item.image_id for item in items if item.truth is None or not item.truth.is_file()]
    if missing:
        message = (
            f"data.{purpose}: {len(missing)} of {len(items)} images have no ground truth, such as "
            f"{', '.join(missing[:3])}; give its folder, or another "
            "split (COCO's: g4seg prepare coco)"
        )
        raise ConfigurationError(message)
