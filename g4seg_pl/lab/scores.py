"""What is kept of a refined image: overlaps of its labels, from which every table is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from g4seg_pl.evaluation.bootstrap import Estimate, bootstrap_overlaps, paired_overlaps
from g4seg_pl.evaluation.boundary import boundary_counts, mean_band_iou, trimap
from g4seg_pl.evaluation.confusion import Counts, confusion_matrix, mean_overlap, overlaps_of
from g4seg_pl.evaluation.soft import threshold_counts

TRIMAP_WIDTHS = (1, 2, 4, 8)
# Finer at the end: a sharp softmax, as MaskCLIP's, has most of its pixels there.
THRESHOLDS = (
    *(round(0.05 * step, 2) for step in range(1, 20)),
    *(0.97, 0.98, 0.99, 0.995, 0.998, 0.999),
)
Integers = NDArray[np.int64]
_COUNTED = ("overlaps", "bands", "trimaps", "curve")


@dataclass(frozen=True)
class Scores:
    """Scores of N images with C labels, one row an image.

    Overlaps are intersection, union and pixels in truth of every label: 3 C numbers, where the
    confusion matrices of all runs of a table would fill the memory for COCO's 81 labels.

    Attributes:
        ids: of the images.
        overlaps: ``(N, 3, C)``.
        bands: ``(N, 2, C)``, intersection and union of boundary bands.
        trimaps: ``(N, W, 3, C)``, overlaps within each of ``TRIMAP_WIDTHS`` of a boundary.
        curve: ``(N, T, 3, C)``, overlaps at each of ``THRESHOLDS``, or T = 0 if not asked for.
        masks: ``(N,)``, classes refined.
        seconds: ``(N,)``, spent on the image by the stages alone.
        noisy: whether noise was drawn; otherwise every noise seed gives the same.
    """

    ids: tuple[str, ...]
    overlaps: Counts
    bands: Counts
    trimaps: Counts
    curve: Counts
    masks: Integers
    seconds: NDArray[np.float64]
    noisy: bool = True

    def select(self, ids: Sequence[str]) -> "Scores":
        """Return the rows of some images in the order given; KeyError if one is missing."""
        place = {name: row for row, name in enumerate(self.ids)}
        rows = [place[name] for name in ids]
        return Scores(
            ids=tuple(ids),
            overlaps=self.overlaps[rows],
            bands=self.bands[rows],
            trimaps=self.trimaps[rows],
            curve=self.curve[rows],
            masks=self.masks[rows],
            seconds=self.seconds[rows],
            noisy=self.noisy,
        )

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return what is saved."""
        named: dict[str, NDArray[np.generic]] = {
            "ids": np.asarray(self.ids, dtype=np.str_),
            "noisy": np.asarray(self.noisy),
            "masks": self.masks,
            "seconds": self.seconds,
        }
        for name in _COUNTED:
            named[name] = getattr(self, name).astype(np.int32)
        return named

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.generic]]) -> "Scores":
        """Return what was saved."""
        counted = {name: np.asarray(each) for name, each in arrays.items()}
        if "counts" in counted:  # saved when the whole matrices were kept
            for name in ("trimaps", "curve"):
                counted[name] = overlaps_of(counted[name])
            counted["overlaps"] = overlaps_of(counted["counts"])
        kept = {name: counted[name].astype(np.int64) for name in (*_COUNTED, "masks")}
        seconds = np.asarray(arrays["seconds"], np.float64)
        ids = tuple(str(name) for name in arrays["ids"])
        return cls(ids=ids, seconds=seconds, noisy=bool(arrays["noisy"]), **kept)


def score_image(
    image_id: str,
    label: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    num_classes: int,
    soft: tuple[NDArray[np.float32], tuple[int, ...]] | None = None,
    seconds: float = 0.0,
    masks: int = 1,
) -> Scores:
    """Return the scores of one image.

    Args:
        image_id: of the image.
        label: ``(H, W)``.
        truth: ``(H, W)``, 255 ignored.
        num_classes: background included.
        soft: maps ``(K, H, W)`` and their labels, if the curve over thresholds is wanted.
        seconds: spent on the image.
        masks: classes refined.
    """
    near = [confusion_matrix(label, trimap(truth, w), num_classes) for w in TRIMAP_WIDTHS]
    curve = np.zeros((0, 3, num_classes), np.int64)
    if soft is not None:
        curve = overlaps_of(threshold_counts(soft[0], soft[1], truth, num_classes, THRESHOLDS))
    return Scores(
        ids=(image_id,),
        overlaps=overlaps_of(confusion_matrix(label, truth, num_classes))[None],
        bands=np.stack(boundary_counts(label, truth, num_classes))[None],
        trimaps=overlaps_of(np.stack(near))[None],
        curve=curve[None],
        masks=np.asarray([masks]),
        seconds=np.asarray([seconds], np.float64),
    )


def join(parts: Sequence[Scores], *, noisy: bool) -> Scores:
    """Return the scores of several groups of images as one, one after the other."""
    names = (*_COUNTED, "masks", "seconds")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    ids = tuple(name for part in parts for name in part.ids)
    return Scores(ids=ids, noisy=noisy, **joined)


def pooled(runs: Sequence[Scores]) -> Scores:
    """Return the sum over noise seeds, image by image.

    Images stay the units that are resampled: noise seeds are no further images.

    Raises:
        ValueError: the runs are not of the same images in the same order.
    """
    if any(run.ids != runs[0].ids for run in runs):
        message = "noise seeds can be pooled over the same images only"
        raise ValueError(message)
    summed = {name: np.sum([getattr(run, name) for run in runs], axis=0) for name in _COUNTED}
    seconds = np.mean([run.seconds for run in runs], axis=0)
    return Scores(ids=runs[0].ids, masks=runs[0].masks, seconds=seconds, **summed)


def boundary_iou(scores: Scores) -> float:
    """Mean over classes of the boundary bands' IoU, in [0, 1]."""
    return mean_band_iou(scores.bands.sum(axis=0), scores.overlaps.sum(axis=0))


@dataclass(frozen=True)
class Line:
    """One way on one kind of seeds, in percent.

    Attributes:
        way: its name.
        miou: data-set mIoU.
        miou_se: bootstrap standard error over images.
        boundary_iou: mean over classes.
        gain: over the reference on the same images, paired.
        gain_se: bootstrap standard error over images, noise seeds summed within each.
        seed_spread: standard deviation of mIoU over noise seeds; 0 without noise, None of a
            single seed.
        seconds: a mask, of the stages alone, with latents and features at hand.
    """

    way: str
    miou: float
    miou_se: float
    boundary_iou: float
    gain: float
    gain_se: float
    seed_spread: float | None
    seconds: float


def line(way: str, reference: Sequence[Scores], runs: Sequence[Scores], resamples: int) -> Line:
    """Return the line of a way.

    Args:
        way: its name.
        reference: what the gain is over, one run a noise seed or a single one.
        runs: of the way, one a noise seed.
        resamples: of the bootstrap.
    """
    ours = pooled(runs)
    gain = gain_of(reference, runs, resamples)
    score = bootstrap_overlaps(ours.overlaps, resamples)
    alone = [mean_overlap(run.overlaps) for run in runs]
    noisy = any(run.noisy for run in runs)
    known = 0.0 if not noisy else None if len(runs) < 2 else float(np.std(alone, ddof=1))
    return Line(
        way=way,
        miou=100 * score.value,
        miou_se=100 * score.standard_error,
        boundary_iou=100 * boundary_iou(ours),
        gain=100 * gain.value,
        gain_se=100 * gain.standard_error,
        seed_spread=None if known is None else 100 * known,
        seconds=float(ours.seconds.sum() / max(1, ours.masks.sum())),
    )


def gain_of(reference: Sequence[Scores], runs: Sequence[Scores], resamples: int) -> Estimate:
    """Return the paired gain in mIoU between two ways, in [-1, 1]."""
    before, after = pooled(reference), pooled(runs)
    if before.ids != after.ids:
        message = "a paired gain needs the same images twice"
        raise ValueError(message)
    # A sum over three seeds against one: the scale of overlaps does not change their IoU.
    return paired_overlaps(before.overlaps, after.overlaps, resamples)
