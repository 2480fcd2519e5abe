"""Scenes as arrays for the recipe: drawn once, kept in shards on disk, read as memory maps."""

import argparse
import os
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from g4seg_pl.world.scenes import CLASSES, FIRST_SEED, IMAGE_SIZE, Split, draw_scene

SHARD = 10_000
DEFAULT_CACHE = Path("outputs/world/cache")


def write_shard(cache: Path, shard: int) -> Path:
    """Draw the training scenes of one shard into ``scenes_<shard>.npy``, once.

    The file holds uint8 rows of pixels ``3·S·S`` (channels first) followed by 12 presence flags.
    """
    path = cache / f"scenes_{shard:03d}.npy"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    pixels = 3 * IMAGE_SIZE * IMAGE_SIZE
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    rows = open_memmap(temporary, "w+", np.uint8, (SHARD, pixels + len(CLASSES)))
    for index in range(SHARD):
        scene = draw_scene(FIRST_SEED["train"] + shard * SHARD + index, max_objects=3)
        rows[index, :pixels] = scene.image.transpose(2, 0, 1).ravel()
        rows[index, pixels:] = [label in scene.labels for label in range(1, len(CLASSES) + 1)]
    rows.flush()
    temporary.rename(path)
    return path


def split_row(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split shard rows into images, float ``(B, 3, S, S)`` in [-1, 1], and presence ``(B, 12)``."""
    pixels = 3 * IMAGE_SIZE * IMAGE_SIZE
    images = rows[:, :pixels].reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE).float() / 127.5 - 1
    return images, rows[:, pixels:].float()


def load_shards(cache: Path, count: int) -> list[NDArray[np.uint8]]:
    """Memory maps of the first ``count`` shards, drawn here where they are missing."""
    return [np.load(write_shard(cache, shard), mmap_mode="r") for shard in range(count)]


def held_out(
    split: Split, count: int, max_objects: int = 3, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes of a split for validation and gates.

    Returns:
        Images ``(N, 3, S, S)`` in [-1, 1], masks ``(N, S, S)`` uint8 and presence ``(N, 12)``.
    """
    seeds = range(FIRST_SEED[split] + first, FIRST_SEED[split] + first + count)
    drawn = [draw_scene(seed, max_objects=max_objects) for seed in seeds]
    images = torch.stack([torch.from_numpy(each.image).permute(2, 0, 1) for each in drawn])
    masks = torch.stack([torch.from_numpy(each.mask) for each in drawn])
    labels = range(1, len(CLASSES) + 1)
    presence = torch.tensor([[float(k in each.labels) for k in labels] for each in drawn])
    return images.float() / 127.5 - 1, masks, presence


def main() -> None:
    """``python -m g4seg_pl.world.data --shards 16 --processes 2`` draws the training scenes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    tasks = [(options.cache, shard) for shard in range(options.shards)]
    with get_context("spawn").Pool(options.processes) as pool:
        pool.starmap(write_shard, tasks, chunksize=1)


if __name__ == "__main__":
    main()
