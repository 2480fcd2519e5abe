"""Scenes of the embedded world as a data set, drawn on demand: nothing is on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from datamodules.base import SeedDataModule
from datamodules.items import Item
from datamodules.reading import ItemReader
from datamodules.seed_files.maps import Dialect, ReadOptions
from datamodules.seed_files.source import SeedSource
from g4seg_pl.types import BadItemError, ConfigurationError, Sample, Seed
from g4seg_pl.world.degrade import Fault, degrade
from g4seg_pl.world.scenes import FIRST_SEED, Scene, Split, draw_scene

_PREFIX = "scene_"


def scene_id(seed: int) -> str:
    """The image id of a scene, e.g. ``scene_20000001``."""
    return f"{_PREFIX}{seed:08d}"


@dataclass(frozen=True)
class SceneReader(ItemReader):
    """Draws a scene instead of reading files; seeds may still come from files.

    Attributes:
        degraded: the fault put into exact masks where no seed files are given.
        max_objects: as in `draw_scene`.
    """

    degraded: Fault | None = None
    max_objects: int = 3

    def read(self, item: Item, *, with_truth: bool) -> Sample:
        """Draws the scene of an item and adds its seed.

        Raises:
            BadItemError: the seed file cannot be used.
        """
        scene = draw_scene(int(item.image_id.removeprefix(_PREFIX)), max_objects=self.max_objects)
        seed = self._scene_seed(item, scene)
        return Sample(
            image_id=item.image_id,
            image=torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(),
            seed=seed,
            class_names=tuple(self.classes.prompt(class_id) for class_id in seed.class_ids),
            truth=torch.from_numpy(scene.mask) if with_truth else None,
        )

    def _scene_seed(self, item: Item, scene: Scene) -> Seed:
        size = (scene.mask.shape[0], scene.mask.shape[1])
        if self.seeds is not None:
            return self.seeds.read(item.image_id, size, scene.labels)
        if self.degraded is None:
            return Seed(scene.labels, torch.zeros(()).expand(len(scene.labels), *size))
        number = int(item.image_id.removeprefix(_PREFIX))
        maps = [degrade(scene.mask == k, self.degraded, number * 13 + k) for k in scene.labels]
        return Seed(scene.labels, torch.stack([torch.from_numpy(each) for each in maps]))

    def check(self, item: Item, *, with_truth: bool) -> tuple[list[str], tuple[int, ...]]:
        """Looks for the seed file; a scene itself cannot be missing."""
        del with_truth
        scene = draw_scene(int(item.image_id.removeprefix(_PREFIX)), max_objects=self.max_objects)
        if self.seeds is None:
            return [], scene.labels
        try:
            self.seeds.check(item.image_id)
        except (BadItemError, OSError) as error:
            return [str(error)], scene.labels
        return [], scene.labels


class ScenesDataModule(SeedDataModule):
    """Scenes of the embedded world with exact masks.

    Seeds come from files (``seeds``), from the exact masks spoilt on purpose (``degraded``), or
    are zero maps of the scene's classes, for models that make seeds.

    Args:
        split: ``train``, ``val`` or ``test``: disjoint ranges of scene seeds.
        count: number of scenes.
        first: index of the first scene within the split.
        seeds: folder of seed files, or None.
        degraded: the fault of `g4seg_pl.world.degrade`, or None.
        max_objects: 1 draws scenes of a single object.
        dialect: dialect of the seed files; ``auto`` detects it.
        seed_options: what the seed files do not say themselves.
        batch_size: images per batch.
        num_workers: drawing processes; 0 draws in the main process.
        shard: ``i/n`` keeps every n-th scene from the i-th on: 1/4 to 4/4.
    """

    bundled_classes = "scenes"

    def __init__(
        self,
        split: Split = "test",
        count: int = 100,
        first: int = 0,
        seeds: str | Path | None = None,
        degraded: Fault | None = None,
        max_objects: int = 3,
        dialect: Dialect | Literal["auto"] = "auto",
        seed_options: ReadOptions | None = None,
        batch_size: int = 4,
        num_workers: int = 0,
        shard: str | None = None,
    ) -> None:
        super().__init__(
            root=".",
            seeds=seeds,
            dialect=dialect,
            seed_options=seed_options,
            batch_size=batch_size,
            num_workers=num_workers,
            shard=shard,
        )
        if seeds is not None and degraded is not None:
            message = "seeds and degraded are both given: take seeds from files or from the truth"
            raise ConfigurationError(message)
        if count < 1 or first < 0:
            message = f"count is {count} and first is {first}: give count >= 1 and first >= 0"
            raise ConfigurationError(message)
        self.split, self.count, self.first = split, count, first
        self.degraded, self.max_objects = degraded, max_objects

    def list_items(self) -> list[Item]:
        """One item a scene; its picture is drawn when it is read."""
        start = FIRST_SEED[self.split] + self.first
        ids = [scene_id(start + index) for index in range(self.count)]
        # The truth is drawn with the picture; the path only says that there is one.
        return [Item(image_id, Path(image_id), Path(image_id)) for image_id in ids]

    def setup(self, stage: str | None = None) -> None:
        """Lists the scenes and opens the folder of seeds."""
        if self._listed is not None:
            return
        super().setup(stage)
        plain = self.reader
        self.reader = SceneReader(
            plain.classes,
            plain.seeds,
            labels=None,
            degraded=self.degraded,
            max_objects=self.max_objects,
        )

    def _open_seeds(self) -> SeedSource | None:
        # A scene knows its classes: without files there is nothing to ask for.
        return None if self.seeds is None else super()._open_seeds()
