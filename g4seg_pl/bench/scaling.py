"""``g4seg bench scaling``: cost against classes, match grid, image size, batch and processes."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from g4seg_pl.bench.allocation import peak_allocated
from g4seg_pl.bench.command import pick_device
from g4seg_pl.bench.match import CHANNELS
from g4seg_pl.bench.processes import processes
from g4seg_pl.bench.rows import Row, table, write_rows
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.sizes import SIZES
from g4seg_pl.bench.steps import AFFINITY
from g4seg_pl.bench.timing import interleaved
from g4seg_pl.core.correspondence import nearest_neighbours
from g4seg_pl.core.steps import Correspondence, UpdateStep
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import Sample, Seed
from g4seg_pl.world.scenes import CLASS_NAMES

CLASSES = (1, 2, 4, 8)
GRIDS = (16, 32, 64, 96)
STRIPS = (64, 1024, None)
SCALES = (0.5, 1.0, 2.0)
BATCHES = (1, 2, 4, 8)


def scaling(
    size: Literal["tiny", "sd21"] = "tiny",
    json: Path | None = None,
    device: str | None = None,
    rounds: int = 3,
    work: Path | None = None,
) -> int:
    """Show how cost grows; nothing here is held against a bar but the processes.

    Args:
        size: of the models.
        json: file for the rows, rewritten as they come.
        device: such as cuda; a GPU if there is one.
        rounds: repetitions.
        work: folder for models and outputs, kept; a temporary one if not given.

    Returns:
        0.
    """
    rows: list[Row] = []
    with TemporaryDirectory() as temporary:
        folder = (Path(temporary) if work is None else work).absolute()
        setting = Setting(SIZES[size], pick_device(device), folder, rounds=rounds)
        for part in (by_classes, by_grid, by_strip, by_image_size, by_batch, processes):
            for row in part(setting):
                rows.append(row)
                if json is not None:
                    write_rows(json, rows)
        print(f"size {size}; {setting.machine}\n\n{table(rows)}")
    return 0


def by_classes(setting: Setting) -> Iterator[Row]:
    """Milliseconds an image, by its classes.

    Args:
        setting: size, place and rounds.
    """
    updates: dict[str, tuple[UpdateStep, ...]] = {
        "paper": (Correspondence(),),
        "paper, classes at once": (Correspondence(all_classes_at_once=True),),
        "affinity": (AFFINITY,),
    }
    for name, update in updates.items():
        refiner = G4SegRefiner(setting.generator, setting.features, update)
        runs = {str(n): partial(_refine, refiner, _sample(setting, n)) for n in CLASSES}
        yield from _rows(setting, f"scaling: {name}, an image by classes", runs)


def by_grid(setting: Setting) -> Iterator[Row]:
    """Milliseconds and memory of a match, by the side of its grid.

    Args:
        setting: place and rounds.
    """
    for side in GRIDS:
        queries, references = torch.randn(2, 1, CHANNELS, side, side, device=setting.device)
        run = partial(nearest_neighbours, queries, references)
        extra = peak_allocated(run, setting.device) / 2**20
        detail = f"{extra:.3g} MiB beyond the features"
        yield from _rows(setting, "scaling: match by side of grid", {str(side): run}, detail)


def by_strip(setting: Setting) -> Iterator[Row]:
    """Milliseconds and memory of a match, by the rows of similarities formed at once.

    Args:
        setting: place and rounds.
    """
    side = GRIDS[-1]
    queries, references = torch.randn(2, 1, CHANNELS, side, side, device=setting.device)
    for strip in STRIPS:
        run = partial(nearest_neighbours, queries, references, chunk=strip)
        detail = f"{peak_allocated(run, setting.device) / 2**20:.3g} MiB beyond the features"
        name = f"scaling: match of {side}×{side} by rows at once"
        yield from _rows(setting, name, {str(strip or "default"): run}, detail)


def by_image_size(setting: Setting) -> Iterator[Row]:
    """Milliseconds a mask, by the working size of its image.

    Args:
        setting: size, place and rounds.
    """
    runs: dict[str, Callable[[], object]] = {}
    for scale in SCALES:
        side = round(scale * setting.size.side)
        refiner = G4SegRefiner(
            setting.generator, setting.features, (Correspondence(),), working_size=side
        )
        runs[str(side)] = partial(_refine, refiner, _sample(setting, 1))
    yield from _rows(setting, "scaling: paper, a mask by side of image", runs)


def by_batch(setting: Setting) -> Iterator[Row]:
    """Milliseconds and memory of an image of many classes, by masks per pass.

    Args:
        setting: size, place and rounds.
    """
    sample = _sample(setting, max(BATCHES))
    for batch in BATCHES:
        refiner = G4SegRefiner(
            setting.generator, setting.features, (Correspondence(),), masks_per_pass=batch
        )
        run = partial(_refine, refiner, sample)
        detail = f"{peak_allocated(run, setting.device) / 1e6:.4g} MB beyond the models"
        name = f"scaling: paper, {len(sample.class_names)} masks by masks per pass"
        yield from _rows(setting, name, {str(batch): run}, detail)


def _rows(
    setting: Setting, name: str, runs: Mapping[str, Callable[[], object]], detail: str = ""
) -> Iterator[Row]:
    """Time runs in turns; a row each."""
    spent = interleaved(runs, setting.rounds, setting.device)
    for place, times in spent.items():
        milliseconds = 1e3 * median(each.seconds for each in times)
        yield Row(f"{name}: {place}", milliseconds, "ms", None, detail)


def _refine(refiner: G4SegRefiner, sample: Sample) -> None:
    with torch.no_grad():
        refiner.refine_samples([sample])


def _sample(setting: Setting, classes: int) -> Sample:
    """A random image with so many random masks."""
    random = torch.Generator().manual_seed(classes)
    height, width = setting.size.native
    image = torch.randint(0, 256, (3, height, width), generator=random, dtype=torch.uint8)
    scores = torch.rand(classes, height, width, generator=random)
    ids = tuple(range(1, classes + 1))
    return Sample("image", image, Seed(ids, scores), CLASS_NAMES[:classes])
