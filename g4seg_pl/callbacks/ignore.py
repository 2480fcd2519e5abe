"""255 in the label files where a mask is not sure of itself, which every training leaves out."""

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from g4seg_pl.callbacks.crf import DenseCRF
from g4seg_pl.callbacks.run_record import describe
from g4seg_pl.segmentation.soft_targets import SoftReading, class_distribution, reading_of
from g4seg_pl.types import IGNORE_INDEX, ConfigurationError, FailedSample, RefinedMask


class IgnoreUncertain(Callback):
    """Label pixels 255, to be ignored in training, where any of the criteria given says so.

    Soft maps are written as they are, and ``test`` scores all pixels. List it before
    :class:`~g4seg_pl.callbacks.writer.MaskWriter` and behind
    :class:`~g4seg_pl.callbacks.crf.DenseCRF`; the run record then names it.

    Args:
        least_probability: of a pixel's label against all others, background among them. CLIP-ES
            takes 0.95 of its dense CRF's marginals.
        between: two foreground probabilities; ignored is what has its largest between them. ToCo
            takes 0.25 and 0.7.
        least_weight: of a pixel's class in ``pixel_weights``, which
            :class:`~g4seg_pl.core.likelihood.ChooseByLikelihood` finds out. Background is kept.

    Raises:
        ConfigurationError: no criterion, or one that is no probability.
    """

    changes_masks = True

    def __init__(
        self,
        least_probability: float | None = None,
        between: tuple[float, float] | None = None,
        least_weight: float | None = None,
    ) -> None:
        super().__init__()
        every = (least_probability, *(between or ()), least_weight)
        limits = [each for each in every if each is not None]
        if not limits:
            msg = "IgnoreUncertain: give least_probability, between or least_weight"
            raise ConfigurationError(msg)
        if not all(0 <= each <= 1 for each in limits) or (between and between[0] >= between[1]):
            got = f"{least_probability=}, {between=}, {least_weight=}"
            msg = f"IgnoreUncertain: {got}; give numbers from 0 to 1, the lower of two first"
            raise ConfigurationError(msg)
        self.least_probability = least_probability
        self.between = between
        self.least_weight = least_weight
        self._reading = SoftReading()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out how soft maps are to be understood, before a model is loaded.

        Raises:
            ConfigurationError: a dense CRF would label all pixels again, or the probabilities of
                the labels are not known.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        place = callbacks.index(self)
        if any(isinstance(each, DenseCRF) for each in callbacks[place:]):
            msg = "trainer.callbacks: DenseCRF labels every pixel; list it before IgnoreUncertain"
            raise ConfigurationError(msg)
        if self.least_probability is None or stage != "predict":
            return
        before = [describe(each) for each in callbacks[:place] if isinstance(each, DenseCRF)]
        config = {"model": describe(pl_module), "changed_by": before}
        remedy = "give IgnoreUncertain another criterion than least_probability"
        self._reading = reading_of({"config": config}, remedy)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any
    ) -> None:
        """Label anew in the list of outputs, which later callbacks are given too."""
        outcomes: list[RefinedMask | FailedSample] = outputs
        for place, mask in enumerate(outcomes):
            if isinstance(mask, RefinedMask):
                label = mask.label.masked_fill(self.uncertain(mask), IGNORE_INDEX)
                outcomes[place] = replace(mask, label=label)

    def uncertain(self, mask: RefinedMask) -> Tensor:
        """Return which pixels of a mask to ignore, bool ``(H, W)``.

        Args:
            mask: with its label map; of an image without classes nothing is uncertain.

        Raises:
            ConfigurationError: weights are asked for and no step found any out.
        """
        found = torch.zeros_like(mask.label, dtype=torch.bool)
        if not mask.class_ids:
            return found
        if self.least_probability is not None:
            distribution = class_distribution(mask.foreground, self._reading)
            found |= _at_label(distribution, mask) < self.least_probability
        if self.between is not None:
            top = mask.foreground.amax(0)
            found |= (top > self.between[0]) & (top < self.between[1])
        if self.least_weight is not None:
            found |= _at_label(_weights(mask), mask) < self.least_weight
        return found


def _at_label(maps: Tensor, mask: RefinedMask) -> Tensor:
    """The value at each pixel of the map ``(K + 1, H, W)`` of its label."""
    labels = torch.tensor([0, *mask.class_ids], dtype=mask.label.dtype)
    index = (mask.label[None] == labels[:, None, None]).long().argmax(0)
    return maps.gather(0, index[None])[0]


def _weights(mask: RefinedMask) -> Tensor:
    if mask.pixel_weights is None:
        msg = (
            f"IgnoreUncertain: no update step weighed the pixels of {mask.image_id}; let "
            "ChooseByLikelihood choose, or leave least_weight out"
        )
        raise ConfigurationError(msg)
    return torch.cat([torch.ones_like(mask.pixel_weights[:1]), mask.pixel_weights])
