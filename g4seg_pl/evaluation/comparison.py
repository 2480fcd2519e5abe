"""Several ways to refine the same images, in one table with paired standard errors."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from g4seg_pl.evaluation.bootstrap import bootstrap_mean_iou, paired_gain
from g4seg_pl.evaluation.confusion import Counts, confusion_matrix


@dataclass(frozen=True)
class Row:
    """One way to refine, scored; all figures in percent.

    Attributes:
        name: of the way.
        miou: data-set mIoU.
        gain: over the reference row, on the same images.
        gain_se: bootstrap standard error of the gain, over images.
    """

    name: str
    miou: float
    gain: float
    gain_se: float


class Comparison:
    """Confusion matrices by row and image.

    Every row must score the same images in the same order; noise seeds count as further images.

    Args:
        num_classes: number of labels, background included.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._counts: dict[str, list[Counts]] = {}

    def add(self, name: str, label: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Score one image's label map ``(H, W)`` in a row; 255 in the truth is ignored."""
        matrix = confusion_matrix(label, truth, self.num_classes)
        self._counts.setdefault(name, []).append(matrix)

    def counts(self, name: str) -> Counts:
        """The row's confusion matrices, ``(N, C, C)``.

        Raises:
            KeyError: no image was added to that row.
        """
        return np.stack(self._counts[name])

    def rows(self, reference: str = "seed", resamples: int = 1000) -> list[Row]:
        """All rows in the order they were first added.

        Args:
            reference: the row that gains are over.
            resamples: of the bootstrap over images.
        """
        base = self.counts(reference)
        rows = []
        for name in self._counts:
            counts = self.counts(name)
            score = bootstrap_mean_iou(counts, resamples)
            gain = paired_gain(base, counts, resamples)
            rows.append(Row(name, 100 * score.value, 100 * gain.value, 100 * gain.standard_error))
        return rows


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [f"| {r.name} | {r.miou:.2f} | {r.gain:+.2f} ± {r.gain_se:.2f} |" for r in rows]
    return "\n".join(["| | mIoU | gain |", "|---|---|---|", *lines])
