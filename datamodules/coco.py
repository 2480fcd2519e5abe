"""COCO 2014 and 2017: 80 things and a background."""

from pathlib import Path
from typing import ClassVar, Literal

from datamodules.base import SeedDataModule
from datamodules.images import Orientation
from datamodules.items import ImageFolder, Item, numbered, read_list
from datamodules.layout import first_folder, ids_in
from datamodules.seed_files.maps import CategoryIds, Dialect, ReadOptions
from datamodules.truth import TruthOptions
from g4seg_pl.types import ConfigurationError

_TRUTH_SUFFIXES = ("_instanceTrainIds.png", ".png")


class COCODataModule(SeedDataModule):
    """COCO in any of the layouts in use, 81 label values with 0 the background.

    Images lie in `{JPEGImages,images}/<split>` or `<split>` under the root; ground truth, as
    label images, in `{SegmentationClass,annotations}/<split>`, flat in `SegmentationClass`, or in
    `coco_seg_anno`, named like the image (`COCO_train2014_000000000009.png`), by its number
    (`000000000009.png`), or with `_instanceTrainIds.png` (COCO-Object).

    Args:
        root: folder of the data set.
        seeds: folder of seed files named by image id, or one COCO JSON file.
        split: `train2014`, `val2014`, `train2017` or `val2017`: all images of that folder.
        list_file: takes only the images of this list.
        truth: folder of ground truth; None looks in the places above.
        truth_ids: `contiguous` label values 0 to 80, or `coco91` category ids.
        class_names: class list; None for COCO's eighty.
        labels: `seed`, or a file of image-level labels.
        dialect: dialect of the seed files; `auto` detects it.
        seed_options: what the seed files do not say themselves.
        orientation: `stored` or `exif`, see `datamodules.images`.
        batch_size: images per batch.
        num_workers: reading processes.
        shard: `i/n`, the i-th of n equal parts, see docs/scale.md.
    """

    bundled_classes: ClassVar[str | None] = "coco"

    def __init__(
        self,
        root: str | Path,
        seeds: str | Path | None = None,
        split: str = "val2017",
        list_file: str | Path | None = None,
        truth: str | Path | None = None,
        truth_ids: CategoryIds = "contiguous",
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
        self.split, self.list_file = split, list_file
        self.truth = None if truth is None else Path(truth).expanduser()
        self.truth_ids: CategoryIds = truth_ids

    @property
    def truth_options(self) -> TruthOptions:
        """Contiguous label values, or COCO's category ids."""
        return TruthOptions(category_ids=self.truth_ids)

    def list_items(self) -> list[Item]:
        """The images of the split, or those of them that are listed."""
        places = [self.local_root / name / self.split for name in ("JPEGImages", "images", "")]
        images = first_folder("split", places)
        if self.list_file is not None:
            ids = [
                line.image_id for line in read_list(Path(self.list_file).expanduser(), "list_file")
            ]
        else:
            ids = ids_in(images, ".jpg")
        if not ids:
            message = f"split: no .jpg in {images}"
            raise ConfigurationError(message)
        folder = self._truth_folder()
        truths = self._truths(folder) if folder else {}
        find = ImageFolder(images).find
        return [Item(name, find(name), self._truth(name, truths)) for name in ids]

    def _truth_folder(self) -> Path | None:
        if self.truth is not None:
            return first_folder("truth", [self.truth])
        places = [
            self.local_root / "SegmentationClass" / self.split,
            self.local_root / "annotations" / self.split,
            self.local_root / "SegmentationClass",
            self.local_root / "coco_seg_anno",
        ]
        return next((place for place in places if place.is_dir()), None)

    @staticmethod
    def _truths(folder: Path) -> dict[str, Path]:
        """Label images by name; the COCO-Object ones where there are two for an image."""
        found: dict[str, Path] = {}
        for suffix in reversed(_TRUTH_SUFFIXES):
            found |= {name: folder / f"{name}{suffix}" for name in ids_in(folder, suffix)}
        return found

    @staticmethod
    def _truth(image_id: str, truths: dict[str, Path]) -> Path | None:
        return truths.get(image_id) or truths.get(numbered(image_id))
