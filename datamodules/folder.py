"""Any folder of images."""

from pathlib import Path
from typing import Literal

from datamodules.base import SeedDataModule
from datamodules.images import Orientation
from datamodules.items import IMAGE_SUFFIXES, ImageFolder, Item, read_list
from datamodules.layout import first_folder
from datamodules.seed_files.maps import Dialect, ReadOptions
from g4seg_pl.types import ConfigurationError


class FolderDataModule(SeedDataModule):
    """Images of one folder, seeds of the same names in another, and a class list.

    Args:
        root: folder of images; every picture in it is an item, folders below it are not entered.
        seeds: folder of seed files named by image id, or one COCO JSON file.
        class_names: class list, one class a line.
        split: a list file to take only some images; None takes all.
        truth: folder of label images `<id>.png`, 0 the background and 255 ignored; optional.
        labels: `seed` or a file of image-level labels.
        dialect: dialect of the seed files; `auto` detects it.
        seed_options: what the seed files do not say themselves.
        orientation: `stored` or `exif`, see `datamodules.images`.
        batch_size: images per batch.
        num_workers: reading processes.
        shard: `i/n`, the i-th of n equal parts, see docs/scale.md.
    """

    def __init__(
        self,
        root: str | Path,
        seeds: str | Path | None = None,
        class_names: str | Path | None = None,
        split: str | None = None,
        truth: str | Path | None = None,
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
        self.split, self.truth = split, None if truth is None else Path(truth)

    def list_items(self) -> list[Item]:
        """The pictures in the folder, by name, or those of the list file."""
        folder = first_folder("root", [self.root])
        truth = None if self.truth is None else first_folder("truth", [self.truth])
        if self.split is not None:
            lines, find = read_list(Path(self.split)), ImageFolder(folder).find
            images = [
                (line.image_id, folder / line.image)
                if line.image
                else (line.image_id, find(line.image_id))
                for line in lines
            ]
        else:
            paths = sorted(folder.iterdir())
            images = [(path.stem, path) for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            message = f"root: no image ({', '.join(IMAGE_SUFFIXES)}) in {folder}"
            raise ConfigurationError(message)
        return [Item(name, path, truth and truth / f"{name}.png") for name, path in images]
