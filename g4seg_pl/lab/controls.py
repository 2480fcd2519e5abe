"""Controls and oracles that only the laboratory needs, beside those of `g4seg_pl.core.controls`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from g4seg_pl.callbacks.run_record import describe
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.generation import Rows, noised
from g4seg_pl.core.refine import refine
from g4seg_pl.core.resize import apply_change, masks_to_working
from g4seg_pl.core.steps import Correspondence, NestedStep
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.lab.cache import identity_of
from g4seg_pl.lab.stages import Batch, Masks, at_threshold


@dataclass(frozen=True)
class NoiseOnly(Correspondence):
    """Matching against a noised image that no U-Net has touched: decode(z_t / √ᾱ)."""

    def generate(self, rows: Rows, context: RefinementContext) -> Tensor:
        """Return the noised images, decoded."""
        noisy, _ = noised(rows, context, self.timestep)
        alpha = float(context.generator.alphas_cumprod[self.timestep])
        return context.generator.decode(noisy / alpha**0.5)


@dataclass(frozen=True)
class Reconstructed(Correspondence):
    """Matching against what the autoencoder alone makes of the image: decode(z₀)."""

    def generate(self, rows: Rows, context: RefinementContext) -> Tensor:
        """Return the images, encoded and decoded."""
        return context.generator.decode(context.latents[list(rows.owner)])


@dataclass(frozen=True)
class Blurred(Correspondence):
    """Matching against the image itself, box-blurred.

    Attributes:
        radius: of the box, in pixels at working size.
    """

    radius: int = 2

    def generate(self, rows: Rows, context: RefinementContext) -> Tensor:
        """Return the images, blurred."""
        side = (2 * self.radius + 1, 2 * self.radius + 1)
        pictures = context.images[list(rows.owner)].permute(0, 2, 3, 1).cpu().numpy()
        blurred = np.stack([cv2.blur(each, side) for each in pictures])
        return torch.from_numpy(blurred).permute(0, 3, 1, 2).to(context.images)


@dataclass(frozen=True)
class WithFeatures:
    """The same steps with another F of Eq. 8.

    Attributes:
        steps: ``Correspondence`` or ``FeatureAffinity``, for instance.
        features: the extractor; loaded on first use.
    """

    steps: list[NestedStep]
    features: DenseFeatures

    def __call__(self, foreground: Tensor, context: RefinementContext) -> Tensor:
        """Return the masks after the steps."""
        masks = foreground
        other = self._context(context)
        for step in self.steps:
            masks = step(masks, other)
        return masks

    def identity(self) -> str:
        """Hash of the extractor's weights, where they are a folder's."""
        return identity_of(getattr(self.features, "model", "none"))

    def _context(self, context: RefinementContext) -> RefinementContext:
        # Kept with the batch, so that the image's features are extracted once for all ways.
        kept: dict[str, Tensor] = context.__dict__.setdefault("features_by_extractor", {})
        name = str(describe(self.features))
        self.features.load(getattr(context.generator, "vae", None))
        # As the generator, or the first extractor of a batch would decide by which it is asked for.
        unet = getattr(context.generator, "unet", None)
        self.features.to(context.images.device, getattr(unet, "dtype", None))
        other = copy.copy(context)
        other.features = self.features
        other.cache = None  # it knows the run's own extractor, and so does a variant's origin
        other._origin = None
        other.__dict__.pop("reference_features", None)
        if name not in kept:
            kept[name] = other.reference_features
        other.__dict__["reference_features"] = kept[name]
        return other


@dataclass(frozen=True)
class TruthInjected:
    """An oracle: a ``Correspondence`` that generates under the true masks and updates the seed's.

    Attributes:
        step: whose settings count.
    """

    step: Callable[..., Any]

    def refine_native(self, masks: Masks, batch: Batch) -> Masks:
        """Return the masks that a perfect injection would lead to.

        Raises:
            TypeError: the step is no Correspondence.
        """
        if not isinstance(self.step, Correspondence):
            message = f"step is a {type(self.step).__name__}; give a Correspondence"
            raise TypeError(message)
        context = batch.context
        size = (context.images.shape[2], context.images.shape[3])
        truth = torch.cat([masks_to_working(each, size) for each in true_masks(batch)])
        before = torch.cat([masks_to_working(each, size) for each in masks.foreground])
        told = at_threshold(self.step, masks.threshold)
        values = {each.name: getattr(told, each.name) for each in fields(told)} | {
            "binarise_at": 0.5
        }
        step = _Told(**values, told=truth)
        after = refine(before.to(context.images.device), context, [step]).float().cpu()
        counts = [len(each) for each in masks.foreground]
        parts = zip(
            masks.foreground, torch.split(before, counts), torch.split(after, counts), strict=True
        )
        return Masks(tuple(apply_change(*part) for part in parts), masks.background)


@dataclass(frozen=True)
class _Told(Correspondence):
    told: Tensor | None = None

    def _rows(self, foreground: Tensor, context: RefinementContext) -> Rows:
        injected = foreground if self.told is None else self.told.to(foreground)
        return super()._rows(injected, context)


def true_masks(batch: Batch) -> list[Tensor]:
    """Return the exact masks of every sample's classes, float32 ``(K, H, W)``."""
    found = []
    for sample in batch.samples:
        if sample.truth is None:
            message = f"{sample.image_id} was read without truth"
            raise ValueError(message)
        found.append(
            torch.stack([(sample.truth == label).float() for label in sample.seed.class_ids])
        )
    return found
