"""``g4seg threshold``: a background threshold without ground truth, or swept on a split of its own.

A threshold chosen on the truth it is then scored with has seen the answers. So ``otsu`` looks at
the seeds alone, and ``sweep`` chooses on one split and reports on another that shares no image
with it.
"""

import json as json_format
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from g4seg_pl.evaluation.bootstrap import bootstrap_overlaps
from g4seg_pl.evaluation.confusion import Counts, mean_overlap, overlaps_of
from g4seg_pl.evaluation.soft import threshold_counts
from g4seg_pl.types import BadItemError, ConfigurationError, Sample

# Only typing here: the command line's help must not wait for torch.
if TYPE_CHECKING:
    from datamodules.base import SeedDataModule

BINS = 256
GRID = tuple(round(0.05 * step, 2) for step in range(1, 20))


def otsu_threshold(histogram: NDArray[np.int64]) -> float:
    """The threshold that parts a histogram of scores into two classes as unlike as can be.

    Otsu, IEEE Trans. SMC 9(1), 1979: the largest between-class variance. Where several cuts are
    equally good (empty bins between two peaks), their mean.

    Args:
        histogram: counts ``(B,)`` over equal bins of [0, 1].

    Returns:
        a boundary between two bins, in (0, 1).

    Raises:
        ConfigurationError: fewer than two bins are filled: nothing can be parted.
    """
    counts = histogram.astype(np.float64)
    if (counts > 0).sum() < 2:
        message = "the seeds have one score only: label images need no threshold, give 0.5"
        raise ConfigurationError(message)
    centres = (np.arange(len(counts)) + 0.5) / len(counts)
    below, total = counts.cumsum()[:-1], counts.sum()
    mass = (counts * centres).cumsum()
    distance = mass[-1] / total * below - mass[:-1]
    # A cut with nothing on one side parts nothing, whatever rounding leaves of its distance.
    parted = (below > 0) & (below < total)
    variance = np.where(parted, distance**2 / np.maximum(below * (total - below), 1), 0)
    best = np.flatnonzero(np.isclose(variance, variance.max(), rtol=1e-12))
    return float((best.mean() + 1) / len(counts))


def otsu(data: "SeedDataModule", json: Path | None = None) -> float:
    """Choose the background threshold of a data set's seeds from their scores alone.

    The histogram is that of each pixel's best class score, over all pixels of all images.

    Args:
        data: the data set with its seeds; its ground truth is not read.
        json: file for the threshold and how it was found.
    """
    histogram = np.zeros(BINS, dtype=np.int64)
    count = 0
    for sample in _samples(data, with_truth=False):
        best = sample.seed.scores.numpy().max(axis=0, initial=0.0)
        histogram += np.histogram(best, BINS, (0, 1))[0]
        count += 1
    threshold = otsu_threshold(histogram)
    found = {
        "rule": "otsu",
        "ground_truth": "not used",
        "threshold": threshold,
        "images": count,
        "seeds": str(data.seeds),
        "split": str(getattr(data, "split", None)),
    }
    _tell(found, json)
    print(
        f"use it with --model.background.init_args.value {threshold:g}, which takes the place of "
        "another background rule"
    )
    return threshold


def sweep(
    choose: "SeedDataModule",
    report: "SeedDataModule",
    thresholds: Sequence[float] = GRID,
    json: Path | None = None,
) -> int:
    """Choose a background threshold on the ground truth of one split, report on another.

    Args:
        choose: the split, with ground truth, whose mIoU decides.
        report: another split, with ground truth, without an image of the first.
        thresholds: to try, in (0, 1).
        json: file for the thresholds, the scores and how they were found.

    Raises:
        ConfigurationError: the splits share images, or a threshold is none.
        BadItemError: an item cannot be used; a score of the rest would be of another split.
    """
    grid = sorted({float(value) for value in thresholds})
    if not grid or not 0 < grid[0] <= grid[-1] < 1:
        message = f"thresholds are {list(thresholds)}; give values between 0 and 1"
        raise ConfigurationError(message)
    shared = {item.image_id for item in choose.items} & {item.image_id for item in report.items}
    if shared:
        message = (
            f"{len(shared)} images are in both splits, among them {sorted(shared)[:3]}: a "
            "threshold chosen on them cannot be scored on them; give two splits"
        )
        raise ConfigurationError(message)
    curve = [100 * mean_overlap(part) for part in _summed(choose, grid)]
    best = int(np.argmax(curve))
    # One threshold is left, and its standard error is over images: each keeps its own counts.
    kept = [overlaps[0] for overlaps in _overlaps(report, grid[best : best + 1])]
    scored = bootstrap_overlaps(np.stack(kept))
    found = {
        "rule": "sweep",
        "ground_truth": "used to choose, on another split than the one reported",
        "threshold": grid[best],
        "chosen_on": str(getattr(choose, "split", None)),
        "reported_on": str(getattr(report, "split", None)),
        "miou_where_chosen": curve[best],
        "miou": 100 * scored.value,
        "miou_se": 100 * scored.standard_error,
        "curve": dict(zip(map(str, grid), curve, strict=True)),
    }
    _tell(found, json)
    return 0


def _samples(data: "SeedDataModule", *, with_truth: bool) -> Iterator[Sample]:
    """Every item; the first that cannot be used is an error."""
    data.setup()
    loader = data.test_dataloader() if with_truth else data.predict_dataloader()
    for batch in loader:
        for item in batch:
            if not isinstance(item, Sample):
                raise BadItemError(item.error)
            yield item


def _summed(data: "SeedDataModule", thresholds: Sequence[float]) -> Counts:
    """Overlaps ``(T, 3, C)`` of a whole split.

    Added up image by image: at many thresholds those of COCO's images would not fit into memory.
    """
    total = np.zeros((len(thresholds), 3, len(data.class_list) + 1), np.int64)
    for overlaps in _overlaps(data, thresholds):
        total += overlaps
    return total


def _overlaps(data: "SeedDataModule", thresholds: Sequence[float]) -> Iterator[Counts]:
    """Overlaps ``(T, 3, C)`` of one image after the other; a split without images is an error."""
    if not data.items:
        message = f"split {getattr(data, 'split', None)} has no image"
        raise ConfigurationError(message)
    classes = len(data.class_list) + 1
    for sample in _samples(data, with_truth=True):
        maps, truth = sample.seed.scores.numpy(), sample.truth
        if truth is None:
            message = f"{sample.image_id} has no ground truth: a sweep needs it"
            raise BadItemError(message)
        ids = sample.seed.class_ids
        counts = threshold_counts(maps, ids, truth.numpy(), classes, thresholds)
        yield overlaps_of(counts)


def _tell(found: dict[str, Any], path: Path | None) -> None:
    """Print what was found, and write it where a file is given."""
    from g4seg_pl.callbacks.run_record import write_text_atomically

    print("\n".join(f"{name}: {value}" for name, value in found.items() if name != "curve"))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json_format.dumps(found, indent=2) + "\n")


def main(words: Sequence[str]) -> int:
    """Run ``otsu`` or ``sweep``.

    Args:
        words: the name and its arguments.

    Returns:
        the exit status.
    """
    from jsonargparse import auto_cli

    auto_cli(
        {"otsu": otsu, "sweep": sweep},
        args=list(words),
        prog="g4seg threshold",
        as_positional=False,
    )
    return 0
