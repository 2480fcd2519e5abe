"""Scenes on disk, and the labels of all rows: the demo's own seeds, refiner and background rule."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from datamodules.scenes import scene_id
from g4seg_pl.callbacks.crf import sharpen
from g4seg_pl.callbacks.output_folder import OutputFolder
from g4seg_pl.core.background import compose_label
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.seeds.clip_es import ClipES
from g4seg_pl.segmentation.loop.plan import (
    NOISE_SEED,
    ROWS,
    Places,
    RowName,
    background,
    crf_settings,
    recipe,
)
from g4seg_pl.types import RefinedMask, Sample
from g4seg_pl.world import prepare
from g4seg_pl.world.demo import refine_all
from g4seg_pl.world.load import load_refiner, load_seed_maker, scenes, with_seeds
from g4seg_pl.world.scenes import FIRST_SEED, Split

CHUNK = 32  # scenes that are lost, and made again, when the loop is killed


@dataclass(frozen=True)
class Chunk:
    """Training scenes whose labels are made together.

    Attributes:
        places: of the loop.
        rows: whose labels are wanted.
        first: index of the first scene within the training split.
        count: number of scenes.
    """

    places: Places
    rows: tuple[RowName, ...]
    first: int
    count: int


def write_tree(places: Places) -> None:
    """Write pictures and truth of all splits, once."""
    size = places.scale
    splits: dict[Split, tuple[int, int]] = {
        "train": (size.train, size.first),
        "val": (size.val, 0),
        "test": (size.test, 0),
    }
    for split, (count, first) in splits.items():
        # The list of a split is written after its files: where it is, they are.
        if not (places.tree / "ImageSets" / "Segmentation" / f"{split}.txt").is_file():
            prepare.scenes(places.tree, split, count, first)


def chunks(places: Places, rows: tuple[RowName, ...] = ROWS) -> list[Chunk]:
    """The chunks that lack a label file of a row."""
    end = places.scale.first + places.scale.train
    firsts = range(places.scale.first, end, CHUNK)
    found = [Chunk(places, rows, first, min(CHUNK, end - first)) for first in firsts]
    return [chunk for chunk in found if missing(chunk)]


def missing(chunk: Chunk) -> list[RowName]:
    """Those of the chunk's rows that lack a label file."""
    start = FIRST_SEED["train"] + chunk.first
    ids = [scene_id(seed) for seed in range(start, start + chunk.count)]
    folders = {row: chunk.places.labels(row) for row in chunk.rows}
    return [
        row
        for row, folder in folders.items()
        if folder is not None
        and not all(OutputFolder(folder).mask_path(image_id).is_file() for image_id in ids)
    ]


def make_labels(chunk: Chunk) -> int:
    """Make what the chunk lacks and write it; returns the number of scenes."""
    rows = missing(chunk)
    samples = with_seeds(scenes("train", chunk.count, chunk.first), _seed_maker())
    masks = {"seed": [_mask("seed", sample, sample.seed.scores) for sample in samples]}
    if any(row.startswith("g4seg") for row in rows):
        refined = refine_all(_refiner(), samples)
        pairs = zip(samples, refined, strict=True)
        masks["g4seg"] = [_mask("g4seg", sample, foreground) for sample, foreground in pairs]
    for row in rows:
        name, _, crf = row.partition("+")
        pairs_of_row = zip(samples, masks[name], strict=True)
        found = [_sharpened(name, *pair) if crf else pair[1] for pair in pairs_of_row]
        _write(chunk.places.labels(row), found)
    return chunk.count


def _mask(name: str, sample: Sample, foreground: torch.Tensor) -> RefinedMask:
    classes = sample.seed.class_ids
    label = compose_label(foreground, classes, background(name))
    return RefinedMask(sample.image_id, classes, foreground, label)


def _sharpened(name: str, sample: Sample, mask: RefinedMask) -> RefinedMask:
    return sharpen(sample, mask, background(name), crf_settings())


def _write(root: Path | None, masks: list[RefinedMask]) -> None:
    if root is None:
        return
    folder = OutputFolder(root)
    folder.make()
    for mask in masks:
        folder.save(mask)


@lru_cache(maxsize=1)
def _seed_maker() -> ClipES:
    return load_seed_maker()


@lru_cache(maxsize=1)
def _refiner() -> G4SegRefiner:
    return load_refiner(NOISE_SEED).with_steps(recipe()[1])
