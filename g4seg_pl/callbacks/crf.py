"""Dense CRF (Krähenbühl and Koltun, 2011) on refined masks, by the settings the field uses.

Needs the extra ``g4seg-pl[crf]`` (``pydensecrf2``); nothing is imported before it is used.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from g4seg_pl.callbacks.mean_field import CRFSettings, Preset, dense_crf, preset, require_crf
from g4seg_pl.core.background import BackgroundRule
from g4seg_pl.types import ConfigurationError, FailedSample, RefinedMask, Sample

__all__ = [
    "CRFSettings",
    "DenseCRF",
    "Preset",
    "dense_crf",
    "preset",
    "require_crf",
    "sharpen",
    "sharpen_batch",
]

Mapper = Callable[..., Iterable[NDArray[np.float32]]]


def sharpen(
    sample: Sample, mask: RefinedMask, background: BackgroundRule, settings: CRFSettings
) -> RefinedMask:
    """Run the dense CRF on one refined mask.

    Args:
        sample: whose image guides the CRF.
        mask: refined masks of the same image.
        background: scores the background against which the classes compete.
        settings: of the CRF.

    Returns:
        the mask with marginals as ``foreground`` and the most probable label at each pixel; what
        was found out about the mask stays as it was.
    """
    return sharpen_batch([(sample, mask)], background, settings)[0]


def sharpen_batch(
    pairs: Sequence[tuple[Sample, RefinedMask]],
    background: BackgroundRule,
    settings: CRFSettings,
    apply: Mapper = map,
) -> list[RefinedMask]:
    """Run the dense CRF on several masks; see :func:`sharpen`.

    Args:
        pairs: images with their masks.
        background: scores the background.
        settings: of the CRF.
        apply: calls a function for each image, such as ``map`` of a pool of processes.
    """
    images = [np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy()) for sample, _ in pairs]
    scores = [_scores(mask, background) for _, mask in pairs]
    found = apply(dense_crf, images, scores, [settings] * len(pairs))
    return [_relabelled(mask, each) for (_, mask), each in zip(pairs, found, strict=True)]


def _scores(mask: RefinedMask, background: BackgroundRule) -> NDArray[np.float32]:
    """Probabilities ``(L, H, W)``, background first."""
    scores = torch.cat([background(mask.foreground)[None], mask.foreground])
    return np.asarray(scores.numpy(), np.float32)


def _relabelled(mask: RefinedMask, marginals: NDArray[np.float32]) -> RefinedMask:
    """The mask with other foreground, labelled by the larger of all marginals."""
    maps = torch.from_numpy(marginals)
    labels = torch.tensor([0, *mask.class_ids], dtype=torch.uint8)
    return replace(mask, foreground=maps[1:], label=labels[maps.argmax(0)])


class DenseCRF(Callback):
    """Sharpen every mask with a dense CRF before it is written, or scored by ``test``.

    Background competes with the classes by the run's own background rule. List it before
    :class:`~g4seg_pl.callbacks.writer.MaskWriter`; the run record then names it.

    Args:
        preset: whose settings to use, see :func:`~g4seg_pl.callbacks.mean_field.preset`.
        scale: factor on the widths in pixels, for pictures larger or smaller than VOC's (about
            500 by 375).
        settings: all parameters by hand, instead of a preset.
        processes: that share the images of a batch; 0 works in the main process. They are
            started with the first batch.
    """

    changes_masks = True

    def __init__(
        self,
        preset: Preset = "clip_es",
        scale: float = 1.0,
        settings: CRFSettings | None = None,
        processes: int = 0,
    ) -> None:
        super().__init__()
        if processes < 0:
            msg = f"processes is {processes}: give 0 for none beside the main one, or more"
            raise ConfigurationError(msg)
        self.preset = preset
        self.scale = scale
        self.settings = settings
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    @property
    def effective_settings(self) -> CRFSettings:
        """The settings in force: preset or own, widths scaled."""
        return (self.settings or preset(self.preset)).scaled(self.scale)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fail before a model is loaded if pydensecrf is missing, or masks are not a refiner's."""
        require_crf()
        if not hasattr(pl_module, "background"):
            name = type(pl_module).__name__
            msg = (
                f"trainer.callbacks: DenseCRF sharpens a refiner's masks, not those of {name}; "
                "set its own argument, such as model.crf"
            )
            raise ConfigurationError(msg)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the processes."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End the processes."""
        self._close()

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Replace the masks in the list of outputs, which later callbacks are given too."""
        self._replace(pl_module, outputs, batch)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Replace the masks in the list of outcomes, which the module then scores."""
        self._replace(pl_module, outputs["outcomes"], batch)

    def _replace(
        self,
        pl_module: Any,
        outputs: list[RefinedMask | FailedSample],
        batch: list[Sample | FailedSample],
    ) -> None:
        """Sharpen in place; what failed stays as it is."""
        places, pairs = [], []
        for place, (item, mask) in enumerate(zip(batch, outputs, strict=True)):
            if isinstance(item, Sample) and isinstance(mask, RefinedMask):
                places.append(place)
                pairs.append((item, mask))
        found = sharpen_batch(pairs, pl_module.background, self.effective_settings, self._mapper())
        for place, mask in zip(places, found, strict=True):
            outputs[place] = mask

    def _mapper(self) -> Mapper:
        """``map`` of the pool, or the plain one."""
        if not self.processes:
            return map
        if self._pool is None:
            # Not forked: a forked process would inherit the GPU's state and every thread's locks.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, context)
        return self._pool.map

    def _close(self) -> None:
        """Let the processes end."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
