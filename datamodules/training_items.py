"""Reading pictures with the masks to train on, or with ground truth; what a worker does."""

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from datamodules.classes import ClassList
from datamodules.errors import bad_item
from datamodules.files import File, openable
from datamodules.images import Orientation, check_size, read_image
from datamodules.items import Item
from datamodules.seed_files.maps import ReadOptions
from datamodules.seed_files.reading import read_seed
from datamodules.truth import TruthOptions, read_truth
from g4seg_pl.segmentation.augmentation import Augmenter
from g4seg_pl.segmentation.label_folder import LabelFolder
from g4seg_pl.segmentation.normalisation import normalise
from g4seg_pl.segmentation.sampling import Draw
from g4seg_pl.segmentation.soft_targets import class_distribution, place_labels, reading_of
from g4seg_pl.types import IGNORE_INDEX, BadItemError, Seed


@dataclass
class MaskReader:
    """Reads pictures, masks, soft maps and truth.

    Attributes:
        classes: the class list.
        orientation: see `datamodules.images`.
        truth: numbering of the ground truth.
        folder: of the masks to train on, which may be exchanged between epochs; None trains on
            the ground truth.
        soft: whether soft maps are read.
    """

    classes: ClassList
    orientation: Orientation
    truth: TruthOptions
    folder: LabelFolder | None = None
    soft: bool = False

    def image(self, item: Item) -> NDArray[np.uint8]:
        """The picture, uint8 ``(H, W, 3)``; BadItemError if it cannot be read."""
        return read_image(item.image, self.orientation)

    def ground_truth(self, item: Item, size: tuple[int, int]) -> NDArray[np.uint8]:
        """The truth, label values ``(H, W)``; BadItemError if it cannot be used."""
        if item.truth is None:
            raise bad_item(item.image_id, "no ground truth for this image", "Give its folder")
        return self._labels(item.truth, "ground truth", size, self.truth)

    def mask(self, item: Item, size: tuple[int, int]) -> NDArray[np.uint8]:
        """The mask to train on, label values ``(H, W)``; BadItemError if it cannot be used."""
        if self.folder is None:
            return self.ground_truth(item, size)
        path = self.folder.mask_file(item.image_id)
        return self._labels(path, "mask", size, TruthOptions())

    def distribution(
        self, item: Item, size: tuple[int, int]
    ) -> tuple[tuple[int, ...], Tensor] | None:
        """The image's classes and ``(K + 1, H, W)`` probabilities; None if none are read.

        Raises:
            BadItemError: they cannot be read, or are of another size.
        """
        if not self.soft or self.folder is None:
            return None
        path = self.folder.soft_file(item.image_id)
        if path is None:
            remedy = "Predict with --writer.soft npz, or set soft to false"
            raise bad_item(item.image_id, "no soft map of this image", remedy)
        seed = read_soft(path, size, len(self.classes))
        return seed.class_ids, class_distribution(seed.scores, reading_of(self.folder.record))

    def _labels(
        self, path: File, what: str, size: tuple[int, int], options: TruthOptions
    ) -> NDArray[np.uint8]:
        values = read_truth(path, len(self.classes), options)
        remedy = "Take masks and pictures of one data set"
        check_size(path, what, (values.shape[0], values.shape[1]), size, remedy)
        return values


def read_soft(path: File, size: tuple[int, int], classes: int) -> Seed:
    """Reads the soft maps that the writer of refined masks left.

    Args:
        path: `.npz` with `foreground` and `class_ids`, or a `.npy` in a seed dialect.
        size: height and width of the picture.
        classes: number of foreground classes.

    Raises:
        BadItemError: unreadable, of another size, or with a class beyond the list.
    """
    if path.suffix != ".npz":
        return read_seed(path, size, classes, options=ReadOptions(empty="keep"))
    try:
        with np.load(openable(path), allow_pickle=False) as content:
            maps, ids = content["foreground"], content["class_ids"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise bad_item(path, f"no soft maps: {error}", "Predict this image again") from error
    if maps.ndim != 3 or len(ids) != len(maps) or not all(1 <= each <= classes for each in ids):
        problem = f"maps {maps.shape} for classes {ids.tolist()} of {classes}"
        raise bad_item(path, problem, "Check class_names, or predict this image again")
    remedy = "Take soft maps and pictures of one data set"
    check_size(path, "soft map", (maps.shape[1], maps.shape[2]), size, remedy)
    return Seed(tuple(int(each) for each in ids), torch.from_numpy(maps.astype(np.float32)))


class TrainingImages(Dataset[dict[str, Tensor]]):
    """Augmented pictures with masks, and with soft maps if the reader reads them.

    An item is `image`, float ``(3, S, S)``, `mask`, long ``(S, S)``, and `soft`, float
    ``(C, S, S)``. A file that cannot be read ends the training: to go on without it would be to
    train on something else than was asked for.

    Args:
        items: what to read.
        reader: how to read it.
        augmenter: what happens to it.
    """

    def __init__(self, items: Sequence[Item], reader: MaskReader, augmenter: Augmenter) -> None:
        self.items, self.reader, self.augmenter = tuple(items), reader, augmenter

    def __len__(self) -> int:
        """The number of items."""
        return len(self.items)

    def __getitem__(self, draw: Draw | int) -> dict[str, Tensor]:
        """An item, by its index; augmented by the draw's seed, or anew each time without one."""
        found = self.compact(draw)
        if found.planes is None:
            return found.item
        return found.item | {"soft": self.place([found.labels], found.planes[None])[0]}

    def compact(self, draw: Draw | int) -> "CompactItem":
        """An item whose soft map has the planes of the image's own labels only."""
        index, seed = draw if isinstance(draw, tuple) else (draw, None)
        item = self.items[index]
        image = self.reader.image(item)
        size = (image.shape[0], image.shape[1])
        mask, found = self.reader.mask(item, size), self.reader.distribution(item, size)
        soft = None if found is None else found[1].permute(1, 2, 0).contiguous().numpy()
        arrays = self.augmenter(image, mask, soft, seed)
        result = {"image": _image(arrays["image"]), "mask": _mask(arrays["mask"])}
        if found is None:
            return CompactItem(result)
        planes = torch.from_numpy(np.ascontiguousarray(arrays["soft"])).permute(2, 0, 1)
        return CompactItem(result, (0, *found[0]), planes.contiguous())

    def place(self, labels: Sequence[tuple[int, ...]], planes: Tensor) -> Tensor:
        """Soft maps of all labels, see `place_labels`."""
        return place_labels(planes, labels, len(self.reader.classes) + 1)


@dataclass(frozen=True)
class CompactItem:
    """What a worker sends: a few planes an image, where all labels of COCO are 81.

    Attributes:
        item: `image` and `mask`.
        labels: label values of the planes, the background's first; empty without soft maps.
        planes: float ``(K + 1, S, S)``, or None.
    """

    item: dict[str, Tensor]
    labels: tuple[int, ...] = ()
    planes: Tensor | None = None


class CompactImages(Dataset[CompactItem]):
    """Training images as a worker sends them, for `collate_compact`.

    Args:
        images: what to read.
    """

    def __init__(self, images: TrainingImages) -> None:
        self.images = images

    def __len__(self) -> int:
        """The number of items."""
        return len(self.images)

    def __getitem__(self, draw: Draw | int) -> CompactItem:
        """An item, see `TrainingImages`."""
        return self.images.compact(draw)


def collate_compact(items: Sequence[CompactItem]) -> dict[str, Any]:
    """Puts items into a batch.

    Returns:
        `image` and `mask`; with soft maps also `soft_planes`, float ``(B, K, S, S)`` for the
        largest number K of labels, and `soft_labels`, the labels of each image's planes.
    """
    names = items[0].item
    batch: dict[str, Any] = {
        name: torch.stack([each.item[name] for each in items]) for name in names
    }
    planes = [each.planes for each in items if each.planes is not None]
    if planes:
        batch["soft_planes"] = pad_sequence(planes, batch_first=True)
        batch["soft_labels"] = [each.labels for each in items]
    return batch


class WholeImages(Dataset[dict[str, Any]]):
    """Pictures at their own size: `image`, `image_id` and, if asked for, the true `mask`.

    Args:
        items: what to read.
        reader: how to read it.
        with_truth: whether ground truth is read, and required.
        multiple: of which there are as many pictures. The first ones again fill up, their truth
            ignored everywhere, so that processes get as many each and no picture counts twice.
    """

    def __init__(
        self, items: Sequence[Item], reader: MaskReader, *, with_truth: bool, multiple: int = 1
    ) -> None:
        self.items, self.reader, self.with_truth = tuple(items), reader, with_truth
        self.multiple = multiple

    def __len__(self) -> int:
        """The number of items, filled up."""
        return math.ceil(len(self.items) / self.multiple) * self.multiple

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The item at an index."""
        item = self.items[index % len(self.items)]
        image = self.reader.image(item)
        found: dict[str, Any] = {"image": _image(image), "image_id": item.image_id}
        if self.with_truth:
            truth = self.reader.ground_truth(item, (image.shape[0], image.shape[1]))
            again = index >= len(self.items)
            found["mask"] = _mask(np.full_like(truth, IGNORE_INDEX) if again else truth)
        return found


def collate_whole(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Puts pictures of one size into a batch.

    Raises:
        BadItemError: they differ in size.
    """
    sizes = {tuple(item["image"].shape[1:]) for item in items}
    if len(sizes) > 1:
        names = [item["image_id"] for item in items][:3]
        problem = f"pictures of sizes {sorted(sizes)[:3]} cannot share a batch"
        message = f"{names}: {problem}. Set data.val_batch_size to 1"
        raise BadItemError(message)
    batch: dict[str, Any] = {"image_id": [item["image_id"] for item in items]}
    for name in ("image", "mask"):
        if name in items[0]:
            batch[name] = torch.stack([item[name] for item in items])
    return batch


def _image(pixels: NDArray[np.uint8]) -> Tensor:
    return normalise(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)).contiguous()


def _mask(labels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(labels)).long()
