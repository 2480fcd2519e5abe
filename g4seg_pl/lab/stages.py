"""What a way to refine is made of: update steps, and refiners that work at native size."""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from g4seg_pl.callbacks.crf import CRFSettings, Preset, dense_crf, preset
from g4seg_pl.callbacks.run_record import Json, describe
from g4seg_pl.core.background import BackgroundRule, Threshold, threshold_of
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.steps import UpdateStep
from g4seg_pl.core.threshold import told_threshold
from g4seg_pl.lab.cache import identity_of, state_of_files
from g4seg_pl.types import ConfigurationError, Sample


@dataclass(frozen=True)
class Remainder:
    """The background scores what the classes leave over of 1."""

    def __call__(self, foreground: Tensor) -> Tensor:
        """Return 1 - the sum of all classes."""
        return (1 - foreground.sum(0)).clamp(0, 1)


@dataclass(frozen=True)
class Batch:
    """Images that all ways refine together.

    Attributes:
        samples: each with at least one class.
        context: their working-size images.
    """

    samples: tuple[Sample, ...]
    context: RefinementContext


@dataclass(frozen=True)
class Masks:
    """Soft masks at native size and how labels are made of them.

    Attributes:
        foreground: ``(K, H, W)`` in [0, 1] of each sample.
        background: the rule in force.
    """

    foreground: tuple[Tensor, ...]
    background: BackgroundRule

    @property
    def threshold(self) -> float:
        """From where on a mask counts as foreground."""
        own = threshold_of(self.background)
        return 0.5 if own is None else own


@runtime_checkable
class NativeStage(Protocol):
    """A refiner of soft masks at the images' own size."""

    def refine_native(self, masks: Masks, batch: Batch) -> Masks:
        """Return the masks of all samples, refined."""


Stage = UpdateStep | NativeStage


@runtime_checkable
class ReadsFiles(Protocol):
    """A stage, or a step within one, whose result depends on files it names."""

    def identity(self) -> str:
        """Digits that change with their contents."""


@dataclass(frozen=True)
class Way:
    """An ordered list of stages; without any it is the seed itself.

    Attributes:
        name: in tables; no part of what results are filed under.
        stages: applied in order.
        background: threshold of the labels at the end; None for the seed's. Where a dense CRF
            was last, labels are its most probable ones.
    """

    name: str
    stages: tuple[Stage, ...] = ()
    background: float | None = None

    def describe(self) -> Json:
        """What determines the result, in terms JSON can hold."""
        return {"stages": [describe(stage) for stage in self.stages], "background": self.background}


@dataclass(frozen=True)
class DenseCRF:
    """The dense CRF, background competing with the classes by the rule in force.

    Attributes:
        preset: whose settings, see `g4seg_pl.callbacks.crf.preset`.
        scale: factor on the widths in pixels, for pictures larger or smaller than VOC's.
        colour: factor on the width in colour.
        strength: factor on both weights.
        background: constant score of the background; None for the rule in force.
    """

    preset: Preset = "clip_es"
    scale: float = 1.0
    colour: float = 1.0
    strength: float = 1.0
    background: float | None = None

    @property
    def settings(self) -> CRFSettings:
        """The parameters in force."""
        scaled = preset(self.preset).scaled(self.scale)
        return replace(
            scaled,
            bilateral_colour=scaled.bilateral_colour * self.colour,
            bilateral_weight=scaled.bilateral_weight * self.strength,
            gaussian_weight=scaled.gaussian_weight * self.strength,
        )

    def refine_native(self, masks: Masks, batch: Batch) -> Masks:
        """Return the marginals; what they leave over is the background's."""
        rule = masks.background if self.background is None else Threshold(self.background)
        refined = []
        for sample, soft in zip(batch.samples, masks.foreground, strict=True):
            scores = torch.cat([rule(soft)[None], soft]).numpy()
            image = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
            refined.append(torch.from_numpy(dense_crf(image, scores, self.settings))[1:])
        return Masks(tuple(refined), Remainder())


@dataclass(frozen=True)
class LabelFiles:
    """What another refiner wrote: label files ``<id>.png`` (SegRefiner, SAMRefiner, g4seg itself).

    Attributes:
        folder: where they lie, in the images' own size, label values as in the truth.
    """

    folder: str

    def refine_native(self, masks: Masks, batch: Batch) -> Masks:
        """Return the files' labels as hard masks.

        Raises:
            ConfigurationError: a file is missing or of another size.
        """
        found = tuple(self._read(sample) for sample in batch.samples)
        return Masks(found, Remainder())

    def identity(self) -> str:
        """Changes with every file written anew."""
        return state_of_files(sorted(Path(self.folder).glob("*.png")))

    def _read(self, sample: Sample) -> Tensor:
        path = Path(self.folder) / f"{sample.image_id}.png"
        if not path.is_file():
            message = f"folder: no {path}; give the folder with a label file of every image"
            raise ConfigurationError(message)
        labels = torch.from_numpy(np.array(Image.open(path)))
        if labels.shape != sample.image.shape[1:]:
            message = f"{path} is {tuple(labels.shape)}, its image {tuple(sample.image.shape[1:])}"
            raise ConfigurationError(message)
        return torch.stack([(labels == label).float() for label in sample.seed.class_ids])


@dataclass(frozen=True)
class CascadePSP:
    """CascadePSP by the package ``segmentation-refinement``; one binary mask a class.

    Attributes:
        weights: folder that has the package's ``model`` weights file.
        fast: its fast mode.
        longest: the side it works at, L.
    """

    weights: str
    fast: bool = False
    longest: int = 900

    def identity(self) -> str:
        """Hash of the weights' files."""
        return identity_of(self.weights)

    def refine_native(self, masks: Masks, batch: Batch) -> Masks:
        """Return the refined masks; each is cut at the threshold first, as the network wants.

        Raises:
            ConfigurationError: the package is not installed.
        """
        try:
            package: Any = import_module("segmentation_refinement")
        except ImportError as error:
            message = (
                "CascadePSP needs segmentation-refinement: pip install segmentation-refinement"
            )
            raise ConfigurationError(message) from error
        device = str(batch.context.images.device)
        network = package.Refiner(device=device, model_folder=self.weights)
        refined = []
        for sample, soft in zip(batch.samples, masks.foreground, strict=True):
            image = sample.image.permute(1, 2, 0).numpy()
            cut = ((soft > masks.threshold) * 255).byte().numpy()
            maps = [network.refine(image, each, fast=self.fast, L=self.longest) for each in cut]
            refined.append(torch.from_numpy(np.stack(maps)).float() / 255)
        return Masks(tuple(refined), Threshold(0.5))


@dataclass(frozen=True)
class BilateralSolver:
    """OpenCV's fast bilateral solver (opencv-contrib) on each mask.

    Attributes:
        space: σ in pixels.
        luma: σ of brightness, 0-255.
        chroma: σ of colour, 0-255.
        smoothness: λ.
    """

    space: float = 8.0
    luma: float = 8.0
    chroma: float = 8.0
    smoothness: float = 128.0

    def refine_native(self, masks: Masks, batch: Batch) -> Masks:
        """Return the solver's masks, those pixels trusted that lie far from the threshold.

        Raises:
            ConfigurationError: this build of OpenCV lacks the solver.
        """
        import cv2

        if not hasattr(cv2, "ximgproc"):
            message = (
                "the bilateral solver is in opencv-contrib, built with Eigen; its wheels are not"
            )
            raise ConfigurationError(message)
        widths = {
            "sigma_spatial": self.space,
            "sigma_luma": self.luma,
            "sigma_chroma": self.chroma,
            "lambda_": self.smoothness,
        }
        solver: Any = cv2.ximgproc.fastBilateralSolverFilter
        refined = []
        for sample, soft in zip(batch.samples, masks.foreground, strict=True):
            guide = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
            maps = []
            for each in soft.numpy():
                trust = np.clip(2 * np.abs(each - masks.threshold), 0.02, 1).astype(np.float32)
                target = np.ascontiguousarray(each, np.float32)
                try:
                    solved = solver(guide, target, trust, **widths)
                except cv2.error as error:  # OpenCV's own wheels are compiled without Eigen
                    message = f"this OpenCV cannot run the bilateral solver: {error}"
                    raise ConfigurationError(message) from error
                maps.append(solved)
            refined.append(torch.from_numpy(np.stack(maps)).clamp(0, 1))
        return Masks(tuple(refined), masks.background)


def at_threshold(step: Any, threshold: float) -> Any:
    """Return a step told where the threshold of its masks lies, those it holds included.

    Its fields ``threshold``, ``binarise_at`` (unless None, which is soft) and ``level`` become
    the threshold in force: none of them is a free setting.
    """
    return told_threshold(step, threshold, always=True)
