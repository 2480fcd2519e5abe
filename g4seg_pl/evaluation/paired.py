"""Seed and refined masks of the same images, scored side by side."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g4seg_pl.evaluation.bootstrap import bootstrap_overlaps, paired_overlaps
from g4seg_pl.evaluation.boundary import boundary_counts, mean_band_iou
from g4seg_pl.evaluation.confusion import Counts, confusion_matrix, overlaps_of


class PairedScores:
    """Overlaps of seed and refined labels with the truth, one pair an image, keyed by the id.

    Keyed, because a distributed test loop may repeat images to fill its last batch; here each
    counts once. Overlaps are kept, not matrices: COCO's 82,081 training images
    would fill 9 GB with those.

    Args:
        num_classes: number of labels, background included.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._overlaps: dict[str, Counts] = {}
        self._bands: dict[str, Counts] = {}

    def __len__(self) -> int:
        """The number of images scored."""
        return len(self._overlaps)

    def add(
        self, image_id: str, seed: NDArray[Any], refined: NDArray[Any], truth: NDArray[Any]
    ) -> None:
        """Score one image; all maps are labels ``(H, W)``, 255 in the truth is ignored."""
        pair = (seed, refined)
        matrices = [confusion_matrix(labels, truth, self.num_classes) for labels in pair]
        bands = [np.stack(boundary_counts(labels, truth, self.num_classes)) for labels in pair]
        self._overlaps[image_id] = overlaps_of(np.stack(matrices))
        self._bands[image_id] = np.stack(bands)

    def update(self, others: Iterable["PairedScores"]) -> None:
        """Take over what other processes scored."""
        for other in others:
            self._overlaps |= other._overlaps
            self._bands |= other._bands

    def summary(self, resamples: int = 1000) -> dict[str, float]:
        """Scores in percent.

        Returns:
            ``n_images``; ``seed_miou``, ``refined_miou`` and their paired ``gain``, each with its
            standard error ``*_se``; ``seed_boundary_iou`` and ``refined_boundary_iou``.

        Raises:
            ValueError: if no image was scored.
        """
        # Sorted, so that the bootstrap does not depend on which process scored what.
        ids = sorted(self._overlaps)
        if not ids:
            msg = "no image was scored: every one failed, or none has ground truth"
            raise ValueError(msg)
        before, after = np.stack([self._overlaps[image_id] for image_id in ids], axis=1)
        estimates = {
            "seed_miou": bootstrap_overlaps(before, resamples),
            "refined_miou": bootstrap_overlaps(after, resamples),
            "gain": paired_overlaps(before, after, resamples),
        }
        scores = {name: 100 * estimate.value for name, estimate in estimates.items()}
        errors = {f"{name}_se": 100 * each.standard_error for name, each in estimates.items()}
        bands = np.sum([self._bands[image_id] for image_id in ids], axis=0)
        sums = (before.sum(axis=0), after.sum(axis=0))
        boundaries = dict(zip(("seed", "refined"), map(mean_band_iou, bands, sums), strict=True))
        return {
            "n_images": float(len(ids)),
            **scores,
            **errors,
            **{f"{name}_boundary_iou": 100 * value for name, value in boundaries.items()},
        }
