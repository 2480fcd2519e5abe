"""The two-line object: a model in, refined masks out."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from g4seg_pl.backbones.controlnet import ControlNetInjection, require_injection
from g4seg_pl.backbones.loading import NumberFormat, place_of, resolve_dtype
from g4seg_pl.backbones.pretrained import load_generator
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.protocols import FeatureExtractor, Generator, ImageCache
from g4seg_pl.core.refine import RefinementState, refine
from g4seg_pl.core.resize import apply_change, image_to_working, masks_to_working
from g4seg_pl.core.steps import UpdateStep
from g4seg_pl.core.threshold import check_threshold, told_threshold
from g4seg_pl.feature_cache import check_folder, open_cache
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.pictures import PictureLike, mask_to_tensor, picture_to_tensor, tensor_like
from g4seg_pl.recipes import Recipe, as_steps, steps_of
from g4seg_pl.types import BadItemError, Sample, Seed, check_sample, check_working_size

MaskLike = TypeVar("MaskLike", Image.Image, np.ndarray, Tensor)


@dataclass(frozen=True)
class Refinement:
    """What came of one sample, at its native size, on the CPU.

    Attributes:
        foreground: float32 ``(K, H, W)`` in [0, 1].
        confidence: float32 ``(K, H, W)`` in [0, 1], if a step of the run measured it, such as
            ``core.confidence.Averaged``; so the others, by ``core.likelihood``.
        score: float32 ``(K,)``, how much better than an empty mask each explains the image.
        score_error: float32 ``(K,)``, standard error of ``score``.
        pixel_weights: float32 ``(K, H, W)`` in [0, 1].
    """

    foreground: Tensor
    confidence: Tensor | None = None
    score: Tensor | None = None
    score_error: Tensor | None = None
    pixel_weights: Tensor | None = None


FINDINGS = tuple(field.name for field in fields(Refinement) if field.name != "foreground")


class G4SegRefiner:
    """Refines coarse masks with a text-to-image model.

    Attributes:
        generator: the text-to-image model.
        features: F of Eq. 8; None if no step compares images.
        steps: the updates, in order.
        threshold: the score from which a pixel will count as foreground; None if not told.
        seed: the run's seed; noise depends on it, the image's id and the class only.
        prompt_template: the prompt, with one ``{}`` for the class.
        masks_per_pass: how many masks at most enter a network at once: the bound on memory.
        working_size: side in pixels of the square that images are refined at.
        cache: keeps what depends on an image alone from run to run; None keeps nothing.
    """

    def __init__(
        self,
        generator: Generator,
        features: FeatureExtractor | None,
        steps: Sequence[UpdateStep] | None = None,
        *,
        threshold: float | None = None,
        seed: int = 0,
        prompt_template: str = "A photo of {}",
        masks_per_pass: int = 8,
        working_size: int | None = None,
        cache: ImageCache | None = None,
    ) -> None:
        """Put loaded parts together.

        Args:
            generator: the text-to-image model, on its device.
            features: a loaded feature extractor on the same device.
            steps: the updates, in order; None for the recipe ``best``.
            threshold: the score from which a pixel of these masks counts as foreground, between 0
                and 1. Steps that cut masks work with it unless they have a value of their own
                (those of your own as ``core.threshold.told_threshold`` says); None leaves them
                at 0.5.
            seed: the run's seed.
            prompt_template: the prompt, with one ``{}`` for the class.
            masks_per_pass: how many masks at most enter a network at once.
            working_size: side of the working square in pixels; None for the generator's own.
            cache: such as ``feature_cache.FeatureCache``.

        Raises:
            ValueError: the threshold is not strictly between 0 and 1, the working size no
                multiple of 8, or the steps are a text.
        """
        self.generator = generator
        self.features = features
        self.threshold = threshold
        self.steps = steps_of("best") if steps is None else as_steps(steps)
        if threshold is not None:
            check_threshold(threshold)
            self.steps = told_threshold(self.steps, threshold)
        self.seed = seed
        self.prompt_template = prompt_template
        self.masks_per_pass = masks_per_pass
        check_working_size(working_size)
        self.working_size = working_size or generator.image_size
        self.cache = cache
        self._prompt_embeddings: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        recipe: Recipe = "best",
        features: DenseFeatures | None = None,
        steps: Sequence[UpdateStep] | None = None,
        device: str | torch.device | None = None,
        dtype: NumberFormat | torch.dtype = "auto",
        variant: str | None = None,
        threshold: float | None = None,
        seed: int = 0,
        prompt_template: str = "A photo of {}",
        masks_per_pass: int = 8,
        working_size: int | None = None,
        revision: str | None = None,
        embedded_guidance: float = 0.0,
        controlnet: ControlNetInjection | None = None,
        decoder: str | None = None,
        cache_features: str | None = None,
    ) -> "G4SegRefiner":
        """Load a Stable Diffusion 1.x or 2.x model, an LCM or SDXL, told apart by its files.

        Args:
            model: a diffusers folder or hub id.
            recipe: ``best``, or ``paper`` for the paper's own update.
            features: the feature extractor; None shares the model's own autoencoder.
            steps: the updates, in order, instead of a recipe's.
            device: where to run; None takes a GPU if there is one.
            dtype: number format, by name or torch's own; ``auto`` is bfloat16 on a GPU and
                float32 elsewhere.
            variant: the weight files' variant, such as ``fp16``.
            threshold: the score from which a pixel of your masks counts as foreground, such as 0.15
                for CAM; None for 0.5.
            seed: the run's seed.
            prompt_template: the prompt, with one ``{}`` for the class.
            masks_per_pass: how many masks at most enter a network at once.
            working_size: side of the working square in pixels; None for the model's own.
            revision: branch, tag or commit of a hub id.
            embedded_guidance: w that an LCM's U-Net is told; 0 is no guidance.
            controlnet: inject masks through a ControlNet instead of attention (Table VIII).
            decoder: folder or hub id of an AutoencoderTiny (TAESD) that decodes instead of the
                model's own autoencoder.
            cache_features: folder that keeps latents and features of images, so that refining
                the same ones again need not encode them.

        Raises:
            ConfigurationError: a model cannot be loaded, or the steps are a text; the message
                names the remedy.
        """
        chosen = steps_of(recipe) if steps is None else as_steps(steps)
        if cache_features is not None:
            check_folder(cache_features)
        place = place_of(device)
        number_format = resolve_dtype(dtype, place)
        if controlnet is not None:
            require_injection(chosen)
        plain = load_generator(
            str(model), number_format, variant, revision, embedded_guidance, decoder
        ).to(place)
        # A copy: loaded, an extractor belongs to one model, device and number format, and the
        # caller may give the same one to another refiner.
        features = VAEFeatures() if features is None else copy.deepcopy(features)
        features.load(plain.vae)
        features.to(place, number_format)
        cache = None
        if cache_features is not None:
            cache = open_cache(cache_features, plain.vae, features)
        return cls(
            plain if controlnet is None else controlnet.load(plain, number_format),
            features,
            chosen,
            threshold=threshold,
            seed=seed,
            prompt_template=prompt_template,
            masks_per_pass=masks_per_pass,
            working_size=working_size,
            cache=cache,
        )

    def with_steps(self, steps: Sequence[UpdateStep]) -> "G4SegRefiner":
        """Return a refiner of the same models and seed with other update steps."""
        return G4SegRefiner(
            self.generator,
            self.features,
            steps,
            threshold=self.threshold,
            seed=self.seed,
            prompt_template=self.prompt_template,
            masks_per_pass=self.masks_per_pass,
            working_size=self.working_size,
            cache=self.cache,
        )

    def refine(
        self,
        image: PictureLike,
        masks: Mapping[str, MaskLike],
        *,
        image_id: str = "image",
        callback: Callable[[RefinementState], None] | None = None,
    ) -> dict[str, MaskLike]:
        """Return each class's refined mask, of the same kind and size as it came.

        Args:
            image: a PIL image, an array ``(H, W, 3)`` or ``(H, W)``, or a tensor ``(3, H, W)``;
                8 bits, or floating point in [0, 1]. Its pixels count as they are stored: turn
                one with an EXIF tag upright first if that is what the masks were made of.
            masks: by class name, each a PIL image, an array or a tensor ``(H, W)``: floating
                point in [0, 1], boolean, integers 0 and 1 only, or 8 bits up to 255.
            image_id: the image's name; noise depends on it.
            callback: sees the working-size state after every step.

        Returns:
            Soft masks in [0, 1]: PIL images of mode F, arrays or tensors of the given floating
            type, float32 if it was none.

        Raises:
            BadItemError: image or mask cannot be used; the message says why.
        """
        pixels = picture_to_tensor(image)
        size = (pixels.shape[1], pixels.shape[2])
        if not masks:
            message = "masks is empty; give at least one class name with its mask"
            raise BadItemError(message)
        scores = torch.stack([mask_to_tensor(mask, name, size) for name, mask in masks.items()])
        seed = Seed(tuple(range(1, len(masks) + 1)), scores)
        sample = Sample(image_id, pixels, seed, tuple(masks))
        refined = self.refine_samples([sample], callback)[0]
        pairs = zip(masks.items(), refined, strict=True)
        return {name: tensor_like(result, mask) for (name, mask), result in pairs}

    def refine_samples(
        self,
        samples: Sequence[Sample],
        callback: Callable[[RefinementState], None] | None = None,
    ) -> list[Tensor]:
        """Return the refined foreground of every sample at native size.

        Args:
            samples: images of any sizes with any number of masks, none included.
            callback: sees the working-size state after every step; masks are those of the
                samples one after the other.

        Returns:
            Float32 ``(K, H, W)`` in [0, 1] on the CPU, one tensor a sample.

        Raises:
            BadItemError: a sample is not as `Sample` says; the message names image and field.
        """
        return [found.foreground for found in self.refine_with_findings(samples, callback)]

    def refine_with_findings(
        self,
        samples: Sequence[Sample],
        callback: Callable[[RefinementState], None] | None = None,
    ) -> list[Refinement]:
        """Return refined masks with what the steps found out about them.

        Args:
            samples: images of any sizes with any number of masks, none included.
            callback: see ``refine_samples``.

        Returns:
            One a sample; a sample without masks has no findings.

        Raises:
            BadItemError: a sample is not as `Sample` says; the message names image and field.
        """
        for sample in samples:
            check_sample(sample)
        results = [Refinement(sample.seed.scores.float().cpu()) for sample in samples]
        seeds = [result.foreground.to(self._resizes_on) for result in results]
        occupied = [index for index, seed in enumerate(seeds) if len(seed)]
        if not occupied:
            return results
        size = (self.working_size, self.working_size)
        before = [masks_to_working(seeds[index], size) for index in occupied]
        context = self.context([samples[index] for index in occupied])
        after = refine(torch.cat(before).to(context.images.device), context, self.steps, callback)
        counts = [len(part) for part in before]
        found = _findings(context, counts, self._resizes_on)
        parts = torch.split(after.float().to(self._resizes_on), counts)
        for place, index in enumerate(occupied):
            seed = seeds[index]
            foreground = apply_change(seed, before[place], parts[place]).cpu()
            native = {name: _to_native(parts[place], seed) for name, parts in found.items()}
            results[index] = Refinement(foreground, **native)
        return results

    def context(self, samples: Sequence[Sample]) -> RefinementContext:
        """Return what update steps share about a batch of samples, at working size."""
        size = (self.working_size, self.working_size)
        device = self.generator.alphas_cumprod.device
        pixels = (sample.image.to(self._resizes_on) for sample in samples)
        images = torch.stack([image_to_working(each, size) for each in pixels])
        counts = torch.tensor([len(sample.class_names) for sample in samples])
        return RefinementContext(
            images=images.to(device),
            image_ids=tuple(sample.image_id for sample in samples),
            class_names=tuple(name for sample in samples for name in sample.class_names),
            owner=torch.arange(len(samples)).repeat_interleave(counts).to(device),
            generator=self.generator,
            features=self.features,
            seed=self.seed,
            prompt_template=self.prompt_template,
            masks_per_pass=self.masks_per_pass,
            prompt_embeddings=self._prompt_embeddings,
            cache=self.cache,
        )

    @property
    def _resizes_on(self) -> torch.device:
        """Where images and masks are resized: the CPU would keep a CUDA GPU waiting.

        Other accelerators lack the smoothing resize.
        """
        device = self.generator.alphas_cumprod.device
        return device if device.type == "cuda" else torch.device("cpu")


def _findings(
    context: RefinementContext, counts: list[int], place: torch.device
) -> dict[str, Sequence[Tensor]]:
    """What the run's steps kept about the masks, one tensor an image."""
    kept = {n: rows.float().to(place) for n, rows in context.kept.items() if n in FINDINGS}
    return {name: torch.split(rows, counts) for name, rows in kept.items()}


def _to_native(rows: Tensor, seed: Tensor) -> Tensor:
    """Numbers as they are; maps at the seed's own size; on the CPU."""
    size = (seed.shape[1], seed.shape[2])
    return (rows if rows.ndim == 1 else masks_to_working(rows, size)).cpu()
