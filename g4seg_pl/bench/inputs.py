"""Image files and seed files of the benchmark: smooth random pictures, one to three classes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.folder import FolderDataModule
from datamodules.seed_files import write_seed
from g4seg_pl.world.scenes import CLASS_NAMES

MOST_CLASSES = 3


@dataclass(frozen=True)
class Inputs:
    """Where the files lie.

    Attributes:
        folder: with ``images``, ``seeds``, ``classes.txt`` and the lists.
        counts: classes of each image, by its name.
    """

    folder: Path
    counts: dict[str, int]

    def data(
        self, names: tuple[str, ...] | None = None, batch_size: int = 1, num_workers: int = 0
    ) -> FolderDataModule:
        """The DataModule of some images, or of all.

        Args:
            names: of the images.
            batch_size: images a batch.
            num_workers: reading processes.
        """
        names = tuple(self.counts) if names is None else names
        split = self.folder / f"{'+'.join(names[:3])}_{len(names)}.txt"
        split.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        return FolderDataModule(
            self.folder / "images",
            self.folder / "seeds",
            self.folder / "classes.txt",
            split=str(split),
            batch_size=batch_size,
            num_workers=num_workers,
        )


def write_inputs(folder: Path, size: tuple[int, int], images: int) -> Inputs:
    """Write images of 1, 2, 3, 1, 2, … classes with soft seeds.

    Args:
        folder: made if it is not there; files in it are replaced.
        size: height and width of the images in pixels.
        images: how many.
    """
    for part in ("images", "seeds"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    counts = {f"image{index:04d}": 1 + index % MOST_CLASSES for index in range(images)}
    for index, (name, count) in enumerate(counts.items()):
        rng = np.random.default_rng(index)
        picture = np.stack([_smooth(rng, size, waves=6) for _ in range(3)], axis=-1)
        noisy = 255 * picture + rng.normal(0, 8, picture.shape)
        pixels = noisy.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        maps = np.stack([_smooth(rng, size, waves=2) for _ in range(count)])
        ids = tuple(1 + (index + place) % len(CLASS_NAMES) for place in range(count))
        write_seed(folder / "seeds" / f"{name}.npz", ids, maps, "npz")
    lines = "".join(f"{name}\n" for name in CLASS_NAMES)
    (folder / "classes.txt").write_text(lines, encoding="utf-8")
    return Inputs(folder, counts)


def _smooth(rng: np.random.Generator, size: tuple[int, int], waves: int) -> NDArray[np.float32]:
    """A sum of a few waves, stretched to [0, 1]."""
    rows, columns = np.mgrid[: size[0], : size[1]] / max(size)
    total = np.zeros(size)
    for _ in range(waves):
        down, right, phase = rng.normal(0, 2 * waves, 3)
        total += np.sin(down * rows + right * columns + phase)
    stretched = (total - total.min()) / (total.max() - total.min())
    return np.asarray(stretched, dtype=np.float32)
