"""Where a gain comes from: seed quality, object size, kind of error, distance to the boundary."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from g4seg_pl.evaluation.bootstrap import paired_overlaps
from g4seg_pl.evaluation.confusion import divide
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.scores import TRIMAP_WIDTHS, Scores, pooled
from g4seg_pl.lab.sources import SeedKind
from g4seg_pl.lab.table import Cell, Table
from g4seg_pl.lab.tables.refinement import named

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
WAYS = ("g4seg", "feature-nn", "affinity", "gradient", "best", "dcrf", "best+dcrf", "g4seg+dcrf")


@dataclass(frozen=True)
class PerMask:
    """One value a foreground class of an image.

    Attributes:
        image: index of the image.
        before: IoU of the seed.
        after: IoU of the refined mask.
        size: share of the picture that the class covers in truth.
        excess: of the seed, pixels too many less pixels too few, as a share of the class.
    """

    image: NDArray[np.int64]
    before: Floats
    after: Floats
    size: Floats
    excess: Floats


def per_mask(before: Scores, after: Scores) -> PerMask:
    """Return IoUs of every class that is in an image's truth, before and after."""
    truth = before.overlaps[:, 2]
    image, label = np.nonzero(truth[:, 1:])
    label = label + 1
    ious = []
    for scores in (before, after):
        intersection, union = scores.overlaps[:, 0], scores.overlaps[:, 1]
        ious.append(divide(intersection, union)[image, label])
    area = truth[image, label]
    # |A or B| = |A| + |B| - |A and B|
    predicted = (before.overlaps[:, 1] + before.overlaps[:, 0])[image, label] - area
    size = area / truth.sum(axis=1)[image]
    return PerMask(image, ious[0], ious[1], size, (predicted - area) / area)


def clustered_mean(
    values: Floats, image: NDArray[np.int64], images: int, resamples: int
) -> tuple[float, float | None]:
    """Return the mean over masks and its standard error by resampling images.

    The masks of a single image say nothing about others: the error is None.
    """
    mean = float(values.mean())
    if len(np.unique(image)) < 2:
        return mean, None
    sums = np.bincount(image, values, minlength=images)
    counts = np.bincount(image, minlength=images)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=resamples)
    draws = divide(weights @ sums, weights @ counts)
    finite = draws[~np.isnan(draws)]
    return mean, float(finite.std(ddof=1)) if len(finite) > 1 else None


def groups_of(masks: PerMask) -> dict[str, Bools]:
    """Return which masks are in which group, in the order of the table."""
    before, size, excess = masks.before, masks.size, masks.excess
    return {
        "seed IoU 0-40": before < 0.4,
        "seed IoU 40-80": (before >= 0.4) & (before < 0.8),
        "seed IoU 80-100": before >= 0.8,
        "object below 4 % of the picture": size < 0.04,
        "object 4-12 %": (size >= 0.04) & (size < 0.12),
        "object above 12 %": size >= 0.12,
        "over-segmented (> 20 % too large)": excess > 0.2,
        "under-segmented (> 20 % too small)": excess < -0.2,
        "about the right size": np.abs(excess) <= 0.2,
        "all masks": np.ones(len(before), bool),
    }


def group_rows(
    lab: Lab, kind: str, way: str, before: Sequence[Scores], after: Sequence[Scores]
) -> list[dict[str, Cell]]:
    """Rows of one way: mean gain in IoU of a mask by group, and gain in trimap IoU by width."""
    seed, ours = pooled(before), pooled(after)
    masks = per_mask(seed, ours)
    rows: list[dict[str, Cell]] = []
    head: dict[str, Cell] = {"seeds": kind, "way": way}
    for name, inside in groups_of(masks).items():
        if not inside.any():
            rows.append({**head, "group": name, "masks": 0})
            continue
        values = 100 * (masks.after - masks.before)[inside]
        gain, error = clustered_mean(values, masks.image[inside], len(seed.ids), lab.resamples)
        count = int(inside.sum())
        rows.append({**head, "group": name, "masks": count, "gain": gain, "gain_se": error})
    for index, width in enumerate(TRIMAP_WIDTHS):
        found = paired_overlaps(seed.trimaps[:, index], ours.trimaps[:, index], lab.resamples)
        rows.append(
            {
                **head,
                "group": f"mIoU within {width} px of a boundary",
                "gain": 100 * found.value,
                "gain_se": 100 * found.standard_error,
            }
        )
    return rows


def groups(lab: Lab) -> Table:
    """Gain by seed quality (Table VII), object size, kind of error and boundary distance."""
    rows: list[dict[str, Cell]] = []
    bands: tuple[SeedKind, ...] = ("degraded_0_40", "degraded_40_80", "degraded_80_100")
    kinds = (*lab.kinds, *(band for band in bands if band not in lab.kinds))
    for kind in kinds:
        found = lab.scores(kind, named(lab, kind, WAYS))
        for name, runs in found.items():
            if name != "seed":
                rows += group_rows(lab, kind, name, found["seed"], runs)
    note = (
        "Masks by their own seed's IoU; paper (P, Table VII): G4Seg +0.2 / +1.9 / +1.1. "
        "Gains of groups are means over masks, standard errors by resampling images. Groups by "
        "the seed's own IoU favour any change at their lower end: compare ways, not groups."
    )
    title = "Gain by seed quality, object size, kind of error and distance to the boundary"
    return Table("groups", title, tuple(rows), lab.protocol(*kinds), (note,))
