"""The confusion matrix of a validation, summed over processes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from g4seg_pl.evaluation.confusion import Counts, class_iou, mean_iou, pixel_accuracy
from g4seg_pl.types import IGNORE_INDEX, ConfigurationError


class ConfusionMatrix(Metric):
    """Counts pixels by true and predicted label; pixels whose truth is 255 do not count.

    Args:
        num_labels: labels, background included.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.num_labels = num_labels
        zeros = torch.zeros(num_labels, num_labels, dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Count a batch: two integer tensors ``(B, H, W)``.

        Raises:
            ConfigurationError: a label is too large for the matrix.
        """
        counted = truth != IGNORE_INDEX
        rows, columns = truth[counted].long(), prediction[counted].long()
        highest = max((int(part.max()) for part in (rows, columns) if len(part)), default=0)
        if highest >= self.num_labels:
            msg = (
                f"label {highest} was met, but there are {self.num_labels} labels, background "
                "included: check num_labels of the network and the data's class_names"
            )
            raise ConfigurationError(msg)
        pairs = self.num_labels * rows + columns
        counts = torch.bincount(pairs, minlength=self.num_labels**2)
        self.counts += counts.view(self.num_labels, self.num_labels)

    def compute(self) -> Tensor:
        """Return the counts ``(C, C)``, rows are the truth."""
        return self.counts


def summary(counts: Counts, names: Sequence[str]) -> dict[str, float]:
    """Return mIoU, pixel accuracy and every class's IoU, in percent.

    Args:
        counts: ``(C, C)``, rows are the truth.
        names: of the labels, background first.

    Returns:
        ``miou``, ``accuracy`` and ``iou/<name>`` of the labels that occur; 0 for all if no pixel
        was counted, as in a dry run whose pictures are ignored throughout.
    """
    if not counts.sum():
        return {"miou": 0.0, "accuracy": 0.0}
    pairs = zip(names, class_iou(counts), strict=True)
    classes = {f"iou/{name}": 100 * float(iou) for name, iou in pairs if iou == iou}
    return {"miou": 100 * mean_iou(counts), "accuracy": 100 * pixel_accuracy(counts)} | classes
