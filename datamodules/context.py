"""PASCAL Context, 59 classes with or without a background."""

from pathlib import Path
from typing import ClassVar, Literal

from datamodules.images import Orientation
from datamodules.seed_files.maps import Dialect, ReadOptions
from datamodules.truth import TruthOptions
from datamodules.voc import VOCDataModule


class ContextDataModule(VOCDataModule):
    """VOCdevkit/VOC2010: JPEGImages, SegmentationClassContext, ImageSets/SegmentationContext.

    Label values are 1 to 59; 0 is everything else: the background (60 label values), or ignored
    (59). With `class_names=context459` seeds of all 459 classes are read (16-bit label images, or
    any other dialect) and converted; label values beyond 254 fit no 8-bit truth or mask file, so
    that such runs are neither scored nor refined.

    Args:
        root: VOC2010 itself, VOCdevkit, or the folder above.
        seeds: folder of seed files named by image id, or one COCO JSON file.
        split: `train`, `val`, or a list file.
        background: whether 0 is scored as background (Context-60) or ignored (Context-59).
        truth: folder of ground truth under the root; None for SegmentationClassContext.
        class_names: class list; None for the 59.
        labels: `seed`, or a file of image-level labels.
        dialect: dialect of the seed files; `auto` detects it.
        seed_options: what the seed files do not say themselves.
        orientation: `stored` or `exif`, see `datamodules.images`.
        batch_size: images per batch.
        num_workers: reading processes.
        shard: `i/n`, the i-th of n equal parts, see docs/scale.md.
    """

    bundled_classes: ClassVar[str | None] = "context"
    places: ClassVar[tuple[str, ...]] = ("VOC2010", "VOCdevkit/VOC2010")

    def __init__(
        self,
        root: str | Path,
        seeds: str | Path | None = None,
        split: str = "val",
        background: bool = True,
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
            split,
            truth or "SegmentationClassContext",
            class_names,
            labels,
            dialect,
            seed_options,
            orientation,
            batch_size,
            num_workers,
            shard,
        )
        self.background = background

    @property
    def lists(self) -> Path:
        """The folder of the split lists."""
        return self.voc / "ImageSets" / "SegmentationContext"

    @property
    def truth_options(self) -> TruthOptions:
        """0 is the background, or ignored."""
        return TruthOptions(zero_is_ignored=not self.background)
