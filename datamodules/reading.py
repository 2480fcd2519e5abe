"""Reading one item into a `Sample`; what a worker process does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset

from datamodules.classes import ClassList
from datamodules.errors import bad_item
from datamodules.files import File
from datamodules.images import Orientation, check_size, header_size, read_image
from datamodules.items import Item, check_id
from datamodules.labels import LabelSource
from datamodules.seed_files.source import SeedSource
from datamodules.truth import TruthOptions, read_truth
from g4seg_pl.types import BadItemError, FailedSample, Sample, Seed


@dataclass(frozen=True)
class ItemReader:
    """Reads images with their seeds, labels and truth.

    Attributes:
        classes: the class list.
        seeds: where seeds come from; None gives maps of zeros for the labelled classes, for
            models that make seeds.
        labels: image-level labels; None takes the seed's own classes.
        orientation: see `datamodules.images`.
        truth: numbering of the ground truth.
    """

    classes: ClassList
    seeds: SeedSource | None
    labels: LabelSource | None
    orientation: Orientation = "stored"
    truth: TruthOptions = field(default_factory=TruthOptions)

    def read(self, item: Item, *, with_truth: bool) -> Sample:
        """Reads an item.

        Raises:
            BadItemError: anything about it cannot be used.
        """
        check_id(item.image_id)
        image = torch.from_numpy(read_image(item.image, self.orientation)).permute(2, 0, 1)
        size = (image.shape[1], image.shape[2])
        labels = self.labels.read(item.image_id) if self.labels else None
        seed = self._seed(item, size, labels)
        return Sample(
            image_id=item.image_id,
            image=image.contiguous(),
            seed=seed,
            class_names=tuple(self.classes.prompt(class_id) for class_id in seed.class_ids),
            truth=self._truth(item, size) if with_truth else None,
            image_path=item.image if isinstance(item.image, Path) else None,
        )

    def _seed(self, item: Item, size: tuple[int, int], labels: tuple[int, ...] | None) -> Seed:
        if self.seeds:
            return self.seeds.read(item.image_id, size, labels)
        ids = labels or ()
        # One zero, seen as maps: nothing is allocated or sent between processes.
        return Seed(ids, torch.zeros(()).expand(len(ids), *size))

    def _truth(self, item: Item, size: tuple[int, int]) -> torch.Tensor:
        path = self._truth_path(item)
        values = read_truth(path, len(self.classes), self.truth)
        remedy = "Take truth and image from one release of the data set"
        check_size(path, "ground truth", (values.shape[0], values.shape[1]), size, remedy)
        return torch.from_numpy(values)

    @staticmethod
    def _truth_path(item: Item) -> File:
        if item.truth is None:
            remedy = "Use predict, or give the folder of ground truth"
            raise bad_item(item.image_id, "no ground truth for this image", remedy)
        return item.truth

    def check(self, item: Item, *, with_truth: bool) -> tuple[list[str], tuple[int, ...]]:
        """Looks at names and headers only.

        Returns:
            Every complaint, and the label values of the image where labels tell them.
        """
        labels: list[int] = []
        checks: list[Callable[[], None]] = [
            lambda: check_id(item.image_id),
            lambda: self._check_headers(item, with_truth=with_truth),
        ]
        if self.labels:
            read = self.labels.read
            checks.append(lambda: labels.extend(read(item.image_id)))
        if self.seeds:
            checks.append(partial(self.seeds.check, item.image_id))
        complaints = [complaint for complaint in map(_complaint, checks) if complaint]
        return complaints, tuple(labels)

    def _check_headers(self, item: Item, *, with_truth: bool) -> None:
        size = header_size(item.image, self.orientation)
        if with_truth:
            truth = self._truth_path(item)
            check_size(truth, "ground truth", header_size(truth), size, "Check the data set")


def _complaint(check: Callable[[], None]) -> str | None:
    try:
        check()
    except (BadItemError, OSError) as error:
        return str(error)
    return None


class ItemDataset(Dataset[Sample | FailedSample]):
    """Items as a map-style data set; one that cannot be read becomes a `FailedSample`.

    Args:
        items: what to read.
        reader: how to read it.
        with_truth: whether ground truth is read, and required.
    """

    def __init__(self, items: Sequence[Item], reader: ItemReader, *, with_truth: bool) -> None:
        self.items, self.reader, self.with_truth = tuple(items), reader, with_truth

    def __len__(self) -> int:
        """The number of items."""
        return len(self.items)

    def __getitem__(self, index: int) -> Sample | FailedSample:
        """The item at an index, read."""
        item = self.items[index]
        try:
            return self.reader.read(item, with_truth=self.with_truth)
        except (BadItemError, OSError) as error:
            return FailedSample(item.image_id, str(error))
