"""NightCity-fine: night streets with Cityscapes' 19 classes, no background."""

from pathlib import Path
from typing import ClassVar, Literal

from datamodules.base import SeedDataModule
from datamodules.images import Orientation
from datamodules.items import Item
from datamodules.layout import find_root, first_folder, ids_in
from datamodules.seed_files.maps import Dialect, ReadOptions
from datamodules.truth import TruthOptions
from g4seg_pl.types import ConfigurationError

_TRUTH_SUFFIX = "_trainIds.png"


class NightCityDataModule(SeedDataModule):
    """nightcity-fine: `{train,val}/{img,lbl or label}`, truth in `*_trainIds.png`.

    trainIds count from 0 without a background; label values here are trainId + 1. Seeds as
    trainId images are read with `seed_options.label_offset=-1`.

    Args:
        root: nightcity-fine itself, or the folder above.
        seeds: folder of seed files named by image id, or one COCO JSON file.
        split: `train` or `val`.
        class_names: class list; None for Cityscapes' 19.
        labels: `seed`, or a file of image-level labels.
        dialect: dialect of the seed files; `auto` detects it.
        seed_options: what the seed files do not say themselves.
        orientation: `stored` or `exif`, see `datamodules.images`.
        batch_size: images per batch.
        num_workers: reading processes.
        shard: `i/n`, the i-th of n equal parts, see docs/scale.md.
    """

    bundled_classes: ClassVar[str | None] = "nightcity"

    def __init__(
        self,
        root: str | Path,
        seeds: str | Path | None = None,
        split: Literal["train", "val"] = "val",
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
        """TrainId + 1."""
        return TruthOptions(label_offset=-1)

    def list_items(self) -> list[Item]:
        """Every image of the split."""
        below = ("nightcity-fine", "data/nightcity-fine")
        folder = find_root(self.local_root, below, [f"{self.split}/img"]) / self.split
        ids = ids_in(folder / "img", ".png")
        if not ids:
            message = f"split: no .png in {folder / 'img'}"
            raise ConfigurationError(message)
        truth = first_folder("split", [folder / "lbl", folder / "label"])
        return [
            Item(name, folder / "img" / f"{name}.png", truth / f"{name}{_TRUTH_SUFFIX}")
            for name in ids
        ]
