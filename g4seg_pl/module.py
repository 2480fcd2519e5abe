"""The LightningModule: only wiring between data, refiner and scores."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn

from g4seg_pl.backbones.controlnet import ControlNetInjection, require_injection
from g4seg_pl.backbones.kinds import check_model
from g4seg_pl.backbones.loading import place_to_run, resolve_dtype
from g4seg_pl.backbones.pretrained import load_generator
from g4seg_pl.backbones.tiny_decoder import check_decoder
from g4seg_pl.core.background import (
    BackgroundRule,
    PowerBackground,
    Threshold,
    compose_label,
    threshold_of,
)
from g4seg_pl.core.steps import Correspondence, UpdateStep
from g4seg_pl.feature_cache import check_folder, open_cache
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.refiner import G4SegRefiner, Refinement
from g4seg_pl.run_scores import RunScores
from g4seg_pl.types import (
    ConfigurationError,
    FailedSample,
    G4SegError,
    RefinedMask,
    Sample,
    check_class_count,
    check_counts,
    check_working_size,
)

# What may be wrong with one image while the others are fine.
ITEM_ERRORS = (G4SegError, FloatingPointError, torch.OutOfMemoryError)

_FULL_PRECISION = "32-true"
FROZEN_PARTS = ("generator.", "features.")


class G4SegModule(pl.LightningModule):
    """Refine coarse masks with a text-to-image diffusion model; nothing is trained.

    Making one is cheap: weights are loaded in ``configure_model``, after the run's other
    arguments have been checked. They are never put into a checkpoint.

    Args:
        model: a diffusers folder or hub id of Stable Diffusion 1.x or 2.x, an LCM or SDXL.
        update: the update steps in order; the paper's one if None. Steps whose ``threshold``, or
            ``binarise_at`` of the injection, has its default take that of ``background``; those of
            your own where the field says so, see ``core.threshold.told_threshold``.
        features: F of Eq. 8, an extractor of dense features; the model's own autoencoder
            if None.
        background: how the background is scored when label maps are made.
        seed: from which all noise derives, with the image's id and the class's name.
        dtype: number format of the weights; ``auto`` is bfloat16 on a GPU, float32 elsewhere.
        prompt_template: the prompt, with one ``{}`` for the class name.
        masks_per_pass: masks that enter a network at once: the bound on memory.
        working_size: side in pixels of the square that images are refined at; None for the
            model's own.
        variant: of the model's weight files, such as ``fp16``.
        revision: branch, tag or commit of a hub id.
        embedded_guidance: w that an LCM's U-Net is told; 0 is no guidance, as everywhere here.
        controlnet: inject masks through a ControlNet instead of attention (Table VIII).
        decoder: a diffusers folder or hub id of an AutoencoderTiny (TAESD) that decodes instead of
            the model's own autoencoder; faster, at a price in quality (docs/generators.md).
        cache_features: folder that keeps latents and features of images, so that refining the same
            ones again, with other steps or seeds, need not encode them.
    """

    def __init__(
        self,
        model: str,
        update: list[Callable[..., Any]] | None = None,
        features: DenseFeatures | None = None,
        background: Threshold | PowerBackground | None = None,
        seed: int = 0,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        prompt_template: str = "A photo of {}",
        masks_per_pass: int = 8,
        working_size: int | None = None,
        variant: str | None = None,
        revision: str | None = None,
        embedded_guidance: float = 0.0,
        controlnet: ControlNetInjection | None = None,
        decoder: str | None = None,
        cache_features: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.update: tuple[UpdateStep, ...] = tuple(
            [Correspondence()] if update is None else update
        )
        # A copy: loaded, an extractor belongs to one model, device and number format.
        self.features = VAEFeatures() if features is None else copy.deepcopy(features)
        self.background: BackgroundRule = background or Threshold()
        self.seed = seed
        self.number_format: Literal["auto", "float32", "bfloat16", "float16"] = dtype
        self.prompt_template = prompt_template
        self.masks_per_pass = masks_per_pass
        self.working_size = working_size
        self.variant = variant
        self.revision = revision
        self.embedded_guidance = embedded_guidance
        self.controlnet = controlnet
        self.decoder = decoder
        self.cache_features = cache_features
        self.generator: nn.Module | None = None
        self.strict_loading = False
        self._refiner: G4SegRefiner | None = None
        self._scores: RunScores | None = None
        self._refined: tuple[RefinedMask | FailedSample, ...] = ()

    def configuration(self) -> dict[str, object]:
        """The arguments, for the run record; ``dtype`` is a property of every LightningModule."""
        return {
            "model": self.model,
            "update": self.update,
            "features": self.features,
            "background": self.background,
            "seed": self.seed,
            "dtype": self.number_format,
            "prompt_template": self.prompt_template,
            "masks_per_pass": self.masks_per_pass,
            "working_size": self.working_size,
            "variant": self.variant,
            "revision": self.revision,
            "embedded_guidance": self.embedded_guidance,
            "controlnet": self.controlnet,
            "decoder": self.decoder,
            # Where they are kept changes nothing; that they are rounds them to float16.
            "cache_features": self.cache_features is not None,
        }

    def setup(self, stage: str) -> None:
        """Refuse arguments that cannot work, before any weights are loaded.

        Raises:
            ConfigurationError: names the argument.
        """
        if self.prompt_template.count("{}") != 1:
            msg = f"prompt_template is {self.prompt_template!r}: it needs exactly one {{}}"
            raise ConfigurationError(msg)
        check_counts(1, masks_per_pass=self.masks_per_pass)
        check_working_size(self.working_size)
        classes = getattr(getattr(self._trainer, "datamodule", None), "class_list", None)
        if classes is not None:
            check_class_count("data.class_names", len(classes))
        self._require_full_precision()
        self._require_streaming()
        if self._has_work():
            check_model(self.model, self.revision)
            if self.decoder is not None:
                check_decoder(self.decoder, self.model, self.revision)
            if self.cache_features is not None:
                check_folder(self.cache_features)
            if self.controlnet is not None:
                require_injection(self.update)
                names = () if classes is None else classes.prompts
                self.controlnet.check(self.model, self.revision, names)

    def configure_model(self) -> None:
        """Load the weights, once; nothing is loaded for a run in which every image is finished."""
        if self._refiner is not None or not self._has_work():
            return
        dtype = resolve_dtype(self.number_format, place_to_run(self))
        plain = load_generator(
            self.model, dtype, self.variant, self.revision, self.embedded_guidance, self.decoder
        )
        self.features.load(plain.vae)
        self.features.to(dtype)
        control = self.controlnet
        generator = plain if control is None else control.load(plain, dtype)
        self.generator = generator
        cache = None
        if self.cache_features is not None:
            cache = open_cache(self.cache_features, plain.vae, self.features)
        self._refiner = G4SegRefiner(
            generator,
            self.features,
            self.update,
            threshold=self._threshold(),
            seed=self.seed,
            prompt_template=self.prompt_template,
            masks_per_pass=self.masks_per_pass,
            working_size=self.working_size,
            cache=cache,
        )

    def _threshold(self) -> float | None:
        """Where the labels are cut, if that is a score that masks can have."""
        threshold = threshold_of(self.background)
        return threshold if threshold is not None and 0 < threshold < 1 else None

    def predict_step(
        self, batch: list[Sample | FailedSample], batch_idx: int = 0
    ) -> list[RefinedMask | FailedSample]:
        """Refine a batch of images of any sizes and class counts.

        An image that cannot be refined becomes a ``FailedSample``; the others go on.

        Returns:
            one an item, in order.
        """
        samples = [item for item in batch if isinstance(item, Sample)]
        refined = iter(self._refine_each(samples) if samples else ())
        return [item if isinstance(item, FailedSample) else next(refined) for item in batch]

    def on_test_start(self) -> None:
        """Start counting."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._scores = RunScores(len(datamodule.class_list) + 1, self.background)

    def test_step(
        self, batch: list[Sample | FailedSample], batch_idx: int = 0
    ) -> dict[str, list[RefinedMask | FailedSample]]:
        """Refine a batch; what callbacks make of it is scored when the batch ends.

        Returns:
            the list under ``outcomes``, in which callbacks may replace masks.
        """
        outcomes = self.predict_step(batch)
        self._refined = tuple(outcomes)
        return {"outcomes": outcomes}

    def on_test_batch_end(
        self,
        outputs: Any,
        batch: list[Sample | FailedSample],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score seeds, refined masks and what callbacks such as ``DenseCRF`` made of these."""
        for item, refined, final in zip(batch, self._refined, outputs["outcomes"], strict=True):
            self._started_scores.add(item, refined, final)

    def on_test_epoch_end(self) -> None:
        """Log the scores of all processes, in percent."""
        self._started_scores.gather(self.trainer.world_size)
        summary = self._started_scores.summary()
        self.log_dict({f"test/{name}": value for name, value in summary.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen weights out: they are found by ``model`` and ``features``."""
        weights = checkpoint["state_dict"]
        for name in [name for name in weights if name.startswith(FROZEN_PARTS)]:
            del weights[name]

    @property
    def failed(self) -> dict[str, str]:
        """Images that could not be scored by the last test, with the error of each."""
        return {} if self._scores is None else dict(self._scores.failed)

    @property
    def _started_scores(self) -> RunScores:
        """The scores of the test in progress."""
        if self._scores is None:
            msg = "no test was started: use Trainer.test"
            raise G4SegError(msg)
        return self._scores

    def _require_full_precision(self) -> None:
        """Refuse the trainer's number formats: features would be rounded before they match."""
        trainer = self._trainer
        if trainer is not None and trainer.precision != _FULL_PRECISION:
            msg = (
                f"trainer.precision is {trainer.precision}: leave it at 32-true and set "
                "model.dtype, the generator's number format; matching and mixing stay in float32"
            )
            raise ConfigurationError(msg)

    def _require_streaming(self) -> None:
        """Refuse to keep predictions, which are frozen dataclasses that Lightning cannot copy."""
        trainer = self._trainer
        if trainer is not None and trainer.predicting and trainer.predict_loop.return_predictions:
            msg = (
                "Trainer.predict needs return_predictions=False: masks go to callbacks, such as "
                "MaskWriter, or any other with on_predict_batch_end"
            )
            raise ConfigurationError(msg)

    def _has_work(self) -> bool:
        """Whether the run has anything to predict; True outside a trainer."""
        trainer = self._trainer
        return trainer is None or not trainer.predicting or trainer.limit_predict_batches != 0

    def _refine_each(self, samples: Sequence[Sample]) -> list[RefinedMask | FailedSample]:
        """Refine together; if something is wrong with one of them, find it by refining singly."""
        try:
            return list(self._refine(samples))
        except ITEM_ERRORS as error:
            if len(samples) == 1:
                return [FailedSample(samples[0].image_id, self._remedy(error))]
        return [outcome for sample in samples for outcome in self._refine_each([sample])]

    def _refine(self, samples: Sequence[Sample]) -> list[RefinedMask]:
        """The samples through the refiner.

        Lightning's inference mode is left, for steps that need a gradient: a tensor made in it
        could never get one, so seeds are copied too.
        """
        if self._refiner is None:
            msg = "the model is not loaded: use Trainer.predict, or call configure_model first"
            raise G4SegError(msg)
        with torch.inference_mode(mode=False), torch.no_grad():
            copies = [_with_own_seed(sample) for sample in samples]
            refined = self._refiner.refine_with_findings(copies)
            return [
                self._labelled(sample, found) for sample, found in zip(copies, refined, strict=True)
            ]

    def _labelled(self, sample: Sample, refined: Refinement) -> RefinedMask:
        """The outcome of one sample with its label map."""
        class_ids = sample.seed.class_ids
        label = compose_label(refined.foreground, class_ids, self.background)
        return RefinedMask(sample.image_id, class_ids, label=label, **vars(refined))

    def _remedy(self, error: BaseException) -> str:
        """An error in one sentence, with what can be done."""
        if isinstance(error, torch.OutOfMemoryError):
            return f"out of memory: lower model.masks_per_pass (now {self.masks_per_pass})"
        if isinstance(error, FloatingPointError):
            return f"{error}: use --model.dtype bfloat16 or float32"
        return str(error)


def _with_own_seed(sample: Sample) -> Sample:
    """The sample with a copy of its maps."""
    return replace(sample, seed=replace(sample.seed, scores=sample.seed.scores.clone()))
