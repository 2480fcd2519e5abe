"""Any folder of images, here or at an address, or tars of them."""

from pathlib import Path
from typing import Literal

from datamodules.addresses import as_location
from datamodules.base import SeedDataModule
from datamodules.files import File
from datamodules.images import Orientation
from datamodules.items import IMAGE_SUFFIXES, Item, read_list
from datamodules.places import Place
from datamodules.seed_files.maps import Dialect, ReadOptions
from g4seg_pl.types import ConfigurationError


class FolderDataModule(SeedDataModule):
    """Images of one place, seeds of the same names in another or in the same, and a class list.

    A place is a local folder, the address of a folder (`s3://bucket/images`), a tar, or a pattern
    of tars (`images-{000..009}.tar`, `memory://images-*.tar`); `datamodules.places` says what ids
    are. Nothing is copied or unpacked: a file is read when its image is due.

    Args:
        root: images; every picture is an item, folders below a folder are not entered.
        seeds: seed files named by image id, or one local COCO JSON file.
        class_names: class list, one class a line.
        split: a list file to take only some images; None takes all.
        truth: place of label images `<id>.png`, 0 the background and 255 ignored; optional.
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
        self.split = split
        self.truth = None if truth is None else as_location(truth)

    def list_items(self) -> list[Item]:
        """The pictures of the place in its order, or those of the list file."""
        place = self._place("root", self.root)
        truth = None if self.truth is None else self._place("truth", self.truth)
        split = self.split
        images = place.listed(IMAGE_SUFFIXES) if split is None else self._chosen(place, split)
        if not images:
            message = f"root: no image ({', '.join(IMAGE_SUFFIXES)}) in {self.root}"
            raise ConfigurationError(message)
        return [
            Item(name, file, None if truth is None else truth.at(f"{name}.png"))
            for name, file in images
        ]

    @staticmethod
    def _chosen(place: Place, split: str) -> list[tuple[str, File]]:
        """The images of a list file, whether they are there or not."""
        at, picture = place.at, place.picture
        return [
            (line.image_id, at(line.image) if line.image else picture(line.image_id))
            for line in read_list(Path(split).expanduser())
        ]
