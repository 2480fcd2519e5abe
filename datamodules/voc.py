"""PASCAL VOC 2012, and anything in its layout."""

from pathlib import Path
from typing import ClassVar, Literal

from datamodules.base import SeedDataModule
from datamodules.images import Orientation
from datamodules.items import ImageFolder, Item, Line, read_list
from datamodules.layout import find_root, ids_in
from datamodules.seed_files.maps import Dialect, ReadOptions
from g4seg_pl.types import ConfigurationError

_AUGMENTED = ("train_aug", "trainaug")


class VOCDataModule(SeedDataModule):
    """VOCdevkit/VOC2012: JPEGImages, SegmentationClass, SegmentationClassAug, ImageSets.

    `train` (1464 images in VOC 2012), `val` (1449) and others are `ImageSets/Segmentation/*.txt`.
    `train_aug` (10582) is read from `train_aug.txt` or `trainaug.txt` or, where neither exists,
    is every id of SegmentationClassAug that is not in `val`; its truth is SegmentationClassAug,
    that of all other splits SegmentationClass.

    Args:
        root: VOC2012 itself, VOCdevkit, or the folder above.
        seeds: folder of seed files named by image id, or one COCO JSON file.
        split: name of a list, or a list file with ids or with lines such as
            `/JPEGImages/x.jpg /SegmentationClassAug/x.png`.
        truth: folder of ground truth under the root; None goes by the split.
        class_names: class list; None for VOC's twenty.
        labels: `seed`, `annotations` (the XML files) or a file of image-level labels.
        dialect: dialect of the seed files; `auto` detects it.
        seed_options: what the seed files do not say themselves.
        orientation: `stored` or `exif`, see `datamodules.images`.
        batch_size: images per batch.
        num_workers: reading processes.
        shard: `i/n`, the i-th of n equal parts, see docs/scale.md.
    """

    bundled_classes: ClassVar[str | None] = "voc"
    places: ClassVar[tuple[str, ...]] = ("VOC2012", "VOCdevkit/VOC2012")

    def __init__(
        self,
        root: str | Path,
        seeds: str | Path | None = None,
        split: str = "train",
        truth: str | None = None,
        class_names: str | Path | None = None,
        labels: str = "seed",
        dialect: Dialect | Literal["auto"] = "auto",
        seed_options: ReadOptions | None = None,
        orientation: Orientation = "stored",
        batch_size: int = 4,
        num_workers: int = 2,
        shard: str | None = None,
    ) -> None:
        super().__init__(
            root,
            seeds,
            class_names,
            labels,
            dialect,
            seed_options,
            orientation,
            batch_size,
            num_workers,
            shard,
        )
        self.split, self.truth = split, truth

    @property
    def voc(self) -> Path:
        """The folder that has JPEGImages."""
        return find_root(self.local_root, self.places, ["JPEGImages"])

    @property
    def annotations(self) -> Path:
        """VOC's XML files; they exist for all images, segmented or not."""
        return self.voc / "Annotations"

    @property
    def lists(self) -> Path:
        """The folder of the split lists."""
        return self.voc / "ImageSets" / "Segmentation"

    def list_items(self) -> list[Item]:
        """The items of the split; ConfigurationError if its list cannot be found."""
        voc = self.voc
        pictures, truth = ImageFolder(voc / "JPEGImages"), voc / self._truth_folder()
        masks = truth if truth.is_dir() else None
        return [self._item(voc, pictures, masks, line) for line in self._lines()]

    def _truth_folder(self) -> str:
        augmented = self.split in (*_AUGMENTED, "aug")
        return self.truth or ("SegmentationClassAug" if augmented else "SegmentationClass")

    def _item(self, voc: Path, pictures: ImageFolder, masks: Path | None, line: Line) -> Item:
        image = voc / line.image if line.image else pictures.find(line.image_id)
        if line.truth and not self.truth:
            return Item(line.image_id, image, voc / line.truth)
        return Item(line.image_id, image, masks and masks / f"{line.image_id}.png")

    def _lines(self) -> list[Line]:
        # Two spellings of one split, the user's own first. Others' `aug.txt` is another split: in
        # some copies train_aug, in others what train_aug adds to train.
        others = _AUGMENTED if self.split in _AUGMENTED else ()
        names = dict.fromkeys((self.split, *others))
        listed = [self.lists / f"{name}.txt" for name in names]
        for path in (*listed, Path(self.split).expanduser()):
            if path.is_file():
                return read_list(path)
        if self.split in _AUGMENTED:
            return self._derived()
        message = f"split: {self.split!r} is neither a file nor a list ({listed[0]})"
        raise ConfigurationError(message)

    def _derived(self) -> list[Line]:
        """train_aug without a list: everything with augmented truth that is not in val."""
        folder, val = self.voc / "SegmentationClassAug", self.lists / "val.txt"
        if not folder.is_dir() or not val.is_file():
            message = (
                f"split: no list {self.lists / 'train_aug.txt'}, and it cannot be derived: that "
                f"needs {folder} and {val}. Put the list there (voc12/train_aug.txt of IRN or "
                "CLIP-ES), give its path as the split, or take train"
            )
            raise ConfigurationError(message)
        held_out = {line.image_id for line in read_list(val)}
        return [Line(name) for name in ids_in(folder, ".png") if name not in held_out]
