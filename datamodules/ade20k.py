"""ADE20K (SceneParse150): 150 classes, no background."""

from pathlib import Path
from typing import ClassVar, Literal

from datamodules.base import SeedDataModule
from datamodules.images import Orientation
from datamodules.items import Item
from datamodules.layout import find_root, first_folder, ids_in
from datamodules.seed_files.maps import Dialect, ReadOptions
from datamodules.truth import TruthOptions
from g4seg_pl.types import ConfigurationError


class ADE20KDataModule(SeedDataModule):
    """ADEChallengeData2016: `{images,annotations}/{training,validation}`.

    Label values are 1 to 150; 0 is not labelled and ignored. Seeds that count from 0, as networks
    trained without a background write them, are read with `seed_options.label_offset=-1`.

    Args:
        root: ADEChallengeData2016 itself, or the folder above.
        seeds: folder of seed files named by image id, or one COCO JSON file.
        split: `training` or `validation`.
        class_names: class list; None for the 150.
        labels: `seed`, or a file of image-level labels.
        dialect: dialect of the seed files; `auto` detects it.
        seed_options: what the seed files do not say themselves.
        orientation: `stored` or `exif`, see `datamodules.images`.
        batch_size: images per batch.
        num_workers: reading processes.
        shard: `i/n`, the i-th of n equal parts, see docs/scale.md.
    """

    bundled_classes: ClassVar[str | None] = "ade20k"

    def __init__(
        self,
        root: str | Path,
        seeds: str | Path | None = None,
        split: Literal["training", "validation"] = "validation",
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
        self.split = split

    @property
    def truth_options(self) -> TruthOptions:
        """0 is ignored."""
        return TruthOptions(zero_is_ignored=True)

    def list_items(self) -> list[Item]:
        """Every image of the split."""
        below = ("ADEChallengeData2016", "ade/ADEChallengeData2016")
        root = find_root(self.local_root, below, ["images"])
        images = first_folder("split", [root / "images" / self.split])
        truth = root / "annotations" / self.split
        ids = ids_in(images, ".jpg")
        if not ids:
            message = f"split: no .jpg in {images}"
            raise ConfigurationError(message)
        has_truth = truth.is_dir()
        return [
            Item(name, images / f"{name}.jpg", truth / f"{name}.png" if has_truth else None)
            for name in ids
        ]
