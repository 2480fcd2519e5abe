"""The LightningDataModule all data sets share: items, seeds, labels, loaders."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.addresses import as_location
from datamodules.classes import ClassList, read_class_list, require_same_classes
from datamodules.images import Orientation
from datamodules.items import Item, check_unique, take_shard
from datamodules.labels import FileLabels, LabelSource, XmlLabels
from datamodules.places import LocalFolder, Place, open_place
from datamodules.reading import ItemDataset, ItemReader
from datamodules.sampling import ProcessSampler, own_part
from datamodules.seed_files.maps import Dialect, ReadOptions
from datamodules.seed_files.source import SeedSource, open_seeds
from datamodules.truth import TruthOptions
from datamodules.workers import outlive_sigterm
from g4seg_pl.types import (
    BadItemError,
    ConfigurationError,
    FailedSample,
    Sample,
    check_counts,
)


class SeedDataModule(LightningDataModule, ABC):
    """Images with coarse masks; subclasses list the items of one layout on disk.

    A batch is a list of `Sample` and `FailedSample`: images keep their own sizes, and an item
    that cannot be used travels on as its complaint instead of ending the run.

    Args:
        root: folder of the data set.
        seeds: folder of seed files, one per image, here or at an address, a tar or a pattern of
            tars (see `datamodules.places`), or one COCO JSON file. None only where `labels` is
            given, for models that make seeds: maps are then zero.
        class_names: class list, a file or the name of a bundled one; None takes the data set's.
        labels: image-level labels: `seed` (the seed's own classes), `annotations`, a file
            (see `datamodules.labels`), or `none` for makers that look for every class.
        dialect: dialect of the seed files; `auto` detects it.
        seed_options: what the seed files do not say themselves.
        orientation: `stored` leaves images as they are in the file, `exif` turns them.
        batch_size: images per batch.
        num_workers: reading processes; 0 reads in the main process.
        shard: `i/n` keeps every n-th item from the i-th on: 1/4 to 4/4 (0/4 is 4/4 too).

    Raises:
        ConfigurationError: no image fits into a batch, or fewer than no processes read.
    """

    bundled_classes: ClassVar[str | None] = None

    def __init__(
        self,
        root: str | Path,
        seeds: str | Path | None = None,
        class_names: str | Path | None = None,
        labels: str = "seed",
        dialect: Dialect | Literal["auto"] = "auto",
        seed_options: ReadOptions | None = None,
        orientation: Orientation = "stored",
        batch_size: int = 4,
        num_workers: int = 2,
        shard: str | None = None,
    ) -> None:
        super().__init__()
        check_counts(1, batch_size=batch_size)
        check_counts(0, num_workers=num_workers)
        self.root = as_location(root)
        self.seeds = None if seeds is None else as_location(seeds)
        self.class_names, self.labels = class_names, labels
        self.dialect, self.seed_options = dialect, seed_options
        self.orientation: Orientation = orientation
        self.batch_size, self.num_workers, self.shard = batch_size, num_workers, shard
        self._excluded: frozenset[str] = frozenset()
        self._listed: tuple[Item, ...] | None = None
        self._places: dict[str, Place] = {}
        # A resumed run may have fewer images left than processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @abstractmethod
    def list_items(self) -> list[Item]:
        """Every item of the split, in order; ConfigurationError names what was looked for."""

    @property
    def local_root(self) -> Path:
        """The root as a local folder, for layouts that are looked through.

        Raises:
            ConfigurationError: it is the address of something else.
        """
        if isinstance(self.root, Path):
            return self.root
        message = (
            f"root: {self.root} is no local folder, which {type(self).__name__} needs. Copy the "
            "data set here, or give its images and seeds to FolderDataModule"
        )
        raise ConfigurationError(message)

    def _place(self, argument: str, location: Path | str) -> Place:
        """Opens a place; what is not a local folder is listed once, images and seeds in one too."""
        name = str(location)
        if name not in self._places:
            place = open_place(argument, location)
            if isinstance(place, LocalFolder):
                return place
            self._places[name] = place
        return self._places[name]

    @property
    def annotations(self) -> Path | None:
        """Folder of VOC-type XML annotations, if the layout has one."""
        return None

    @property
    def truth_options(self) -> TruthOptions:
        """The numbering of the ground truth."""
        return TruthOptions()

    def setup(self, stage: str | None = None) -> None:
        """Lists the items and opens seeds and labels; runs once, before any model is loaded.

        Raises:
            ConfigurationError: a folder, list or class list is missing, or options disagree.
        """
        if self._listed is not None:
            return
        self.class_list = self._read_classes()
        items = self.list_items()
        check_unique(items)
        self.reader = ItemReader(
            classes=self.class_list,
            seeds=self._open_seeds(),
            labels=self._open_labels(),
            orientation=self.orientation,
            truth=self.truth_options,
        )
        self._listed = tuple(take_shard(items, self.shard))

    def _read_classes(self) -> ClassList:
        source = self.class_names or self.bundled_classes
        if source is None:
            message = "class_names: None given, and this data set has no class list of its own"
            raise ConfigurationError(message)
        return read_class_list(source)

    def _open_seeds(self) -> SeedSource | None:
        if self.seeds is not None:
            require_same_classes(self.class_list, self.seeds)
            options = (self.class_list, self.dialect, self.seed_options)
            return open_seeds(self.seeds, *options, opener=self._place)
        if self.labels == "seed":
            message = "seeds: None given; give the folder of seed files, or labels to make seeds of"
            raise ConfigurationError(message)
        return None

    def _open_labels(self) -> LabelSource | None:
        if self.labels in ("seed", "none"):
            return None
        if self.labels != "annotations":
            return FileLabels(Path(self.labels).expanduser(), self.class_list)
        if self.annotations is None:
            message = "labels: this layout has no annotations; give seed, or the file of labels"
            raise ConfigurationError(message)
        return XmlLabels(self.annotations, self.class_list)

    @property
    def items(self) -> tuple[Item, ...]:
        """The items of this shard that are not excluded, in order."""
        if self._listed is None:
            self.setup()
        listed = self._listed or ()
        return tuple(item for item in listed if item.image_id not in self._excluded)

    def seed_dialect(self) -> Dialect | None:
        """The dialect that is forced, or that of the first seed; None without seeds."""
        seeds = self.reader.seeds
        for item in self.items if seeds else ():
            try:
                return seeds.dialect_of(item.image_id) if seeds else None
            except (BadItemError, OSError):
                continue  # its own complaint is made where the item is read
        return None

    def exclude(self, ids: Collection[str]) -> None:
        """Leaves out items that are finished already; to be called before a loader is made.

        What an earlier call left out counts again: a second run looks at the whole list.

        Args:
            ids: image ids; those that are not listed do not matter.
        """
        self._excluded = frozenset(ids)

    def predict_dataloader(self) -> DataLoader[Sample | FailedSample]:
        """All items, without ground truth; of several processes each gets its own part."""
        return self._loader(with_truth=False, sampler=own_part(self.trainer, self.items))

    def train_dataloader(self) -> DataLoader[Sample | FailedSample]:
        """All items in another order each epoch, for models trained on image-level labels.

        An incomplete last batch is left out, unless it is the only one.
        """
        return DataLoader(
            ItemDataset(self.items, self.reader, with_truth=False),
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            worker_init_fn=outlive_sigterm,
            collate_fn=list,
            drop_last=len(self.items) > self.batch_size,
        )

    def test_dataloader(self) -> DataLoader[Sample | FailedSample]:
        """All items with ground truth.

        Raises:
            ConfigurationError: the split has no ground truth at all.
        """
        if self.items and not any(item.truth for item in self.items):
            message = "test: these items have no ground truth; use predict, or give its folder"
            raise ConfigurationError(message)
        return self._loader(with_truth=True)

    def _loader(
        self, *, with_truth: bool, sampler: ProcessSampler | None = None
    ) -> DataLoader[Sample | FailedSample]:
        return DataLoader(
            ItemDataset(self.items, self.reader, with_truth=with_truth),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=outlive_sigterm,
            collate_fn=list,
        )

    def transfer_batch_to_device(
        self, batch: list[Sample | FailedSample], device: torch.device, dataloader_idx: int
    ) -> list[Sample | FailedSample]:
        """Leaves the batch where it is.

        Lightning's own transfer refuses frozen dataclasses, and the model moves what it needs.
        """
        return batch
