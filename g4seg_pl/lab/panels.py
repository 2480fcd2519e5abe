"""Single pictures of a figure: what a way did to one mask, drawn for the eye."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.background import BackgroundRule, Threshold
from g4seg_pl.core.refine import RefinementState
from g4seg_pl.lab.chain import ChainRunner, labels_of, make_batch
from g4seg_pl.lab.stages import Masks, NativeStage, Way, at_threshold
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.report import pictures
from g4seg_pl.types import ConfigurationError, Sample

RIGHT, WRONG = (0, 0, 0), (230, 30, 30)
POINTS = 15


@dataclass(frozen=True)
class Trace:
    """What a way did to one sample's masks.

    Attributes:
        label: uint8 ``(H, W)``.
        foreground: ``(K, H, W)``, native size.
        artifacts: of the last step that left any, one row a mask: ``generated``, ``neighbours``.
    """

    label: Tensor
    foreground: Tensor
    artifacts: Mapping[str, Tensor] = field(default_factory=dict)


def trace(
    refiner: G4SegRefiner, way: Way, samples: Sequence[Sample], rule: BackgroundRule
) -> list[Trace]:
    """Refine samples by a way and keep what its steps leave behind.

    Args:
        refiner: the models.
        way: with stages at native size among them, nothing is left behind.
        samples: each with at least one class.
        rule: the seeds' background.
    """
    masks = Masks(tuple(sample.seed.scores.float() for sample in samples), rule)
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        if any(isinstance(stage, NativeStage) for stage in way.stages):
            masks = ChainRunner(make_batch(refiner, samples), masks).run(way).masks
        elif way.stages:
            steps = [at_threshold(stage, masks.threshold) for stage in way.stages]

            def keep(state: RefinementState) -> None:
                kept.update({name: each.cpu() for name, each in state.artifacts.items()})

            found = refiner.with_steps(steps).refine_samples(samples, keep)
            last = rule
            if way.background is not None and isinstance(rule, Threshold):
                last = Threshold(way.background)
            masks = Masks(tuple(found), last)
    counts = [len(sample.class_names) for sample in samples]
    split = {name: torch.split(each, counts) for name, each in kept.items()}
    labels = labels_of(masks, samples)
    return [
        Trace(label, soft, {name: parts[index] for name, parts in split.items()})
        for index, (label, soft) in enumerate(zip(labels, masks.foreground, strict=True))
    ]


@dataclass(frozen=True)
class Row:
    """One row of a figure: a mask, or a whole picture.

    Attributes:
        sample: the image.
        seed: what the seed is without any refinement.
        ways: traces by the way's name.
        threshold: from where on the seed counts as foreground.
        mask: which of the sample's masks; None shows the labels of all.
        side: longer side of a picture.
    """

    sample: Sample
    seed: Trace
    ways: Mapping[str, Trace]
    threshold: float
    mask: int | None
    side: int

    def panel(self, column: str) -> Image.Image:
        """Return the picture of a column: a word, and for most a way's name after it.

        Raises:
            ConfigurationError: there is no such column, or the way leaves no such thing behind.
        """
        word, _, name = column.partition(" ")
        way = self.ways.get(name, self.seed)
        match word:
            case "image":
                return self._photograph
            case "truth":
                return self._labels(self._truth)
            case "seed" | "mask":
                return self._labels(way.label)
            case "soft":
                return self._heat(way.foreground[self._place])
            case "change":
                before, after = self._shown(self.seed.label), self._shown(way.label)
                picture = pictures.change(before, after, self._shown(self._truth))
                return pictures.fit(picture, self._size)
            case "generated":
                return self._generated(name)
            case "partner":
                return self._heat(self._partner(name))
            case "points":
                return pictures.marks(self._generated(name), *self._points(name), "circle")
            case "stars":
                places, rings = self._points(name)
                return pictures.marks(self._photograph, self._stars(name, places), rings, "star")
        message = f"columns: {column!r} is none that can be drawn"
        raise ConfigurationError(message)

    @property
    def _place(self) -> int:
        return self.mask or 0

    @property
    def _size(self) -> tuple[int, int]:
        return pictures.fitted_size((self._truth.shape[0], self._truth.shape[1]), self.side)

    @property
    def _truth(self) -> Tensor:
        truth = self.sample.truth
        return self.seed.label * 0 if truth is None else truth

    @property
    def _pixels(self) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self.sample.image.permute(1, 2, 0).numpy())

    @property
    def _photograph(self) -> Image.Image:
        return pictures.fit(Image.fromarray(self._pixels), self._size, smooth=True)

    def _shown(self, label: Tensor) -> NDArray[np.uint8]:
        """A label map with the row's own class alone, if it shows one."""
        if self.mask is None:
            return label.numpy()
        own = self.sample.seed.class_ids[self.mask]
        return torch.where((label == own) | (label == 255), label, 0).numpy()

    def _labels(self, label: Tensor) -> Image.Image:
        shown = self._shown(label)
        return pictures.fit(pictures.overlay(self._pixels, shown * (shown != 255)), self._size)

    def _heat(self, soft: Tensor) -> Image.Image:
        return pictures.fit(pictures.heat(soft.numpy()), self._size)

    def _artifact(self, what: str, name: str) -> Tensor:
        found = self.ways[name].artifacts if name in self.ways else {}
        if what not in found:
            message = f"columns: way {name!r} leaves no {what!r} to be drawn"
            raise ConfigurationError(message)
        return found[what][self._place]

    def _generated(self, name: str) -> Image.Image:
        made = (self._artifact("generated", name) + 1) * 127.5
        pixels = made.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
        return pictures.fit(Image.fromarray(pixels), self._size, smooth=True)

    def _partner(self, name: str) -> Tensor:
        """S[δ] on the matching grid."""
        places = self._artifact("neighbours", name)
        coarse = self._coarse(self.seed.foreground[self._place], places)
        return coarse.flatten()[places.flatten()].view_as(coarse)

    def _coarse(self, soft: Tensor, places: Tensor) -> Tensor:
        grid = (places.shape[0], places.shape[1])
        return functional.adaptive_avg_pool2d(soft[None], grid)[0]

    def _points(self, name: str) -> tuple[list[tuple[float, float]], list[tuple[int, int, int]]]:
        """Random cells of the matching grid, most of them where the seed is wrong, if any are."""
        wrong = self._wrong(self._artifact("neighbours", name))
        rng = np.random.default_rng(list(self.sample.image_id.encode()))
        cells = rng.permutation(wrong.size)
        faulty, others = cells[wrong.flat[cells]], cells[~wrong.flat[cells]]
        most = 2 * POINTS // 3
        chosen = [*faulty[:most].tolist(), *others.tolist(), *faulty[most:].tolist()][:POINTS]
        rings = [WRONG if wrong.flat[cell] else RIGHT for cell in chosen]
        return [_middle(cell, wrong.shape) for cell in chosen], rings

    def _stars(self, name: str, places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        partners = self._artifact("neighbours", name).numpy()
        rows, columns = partners.shape
        cells = [(int(row * rows), int(column * columns)) for row, column in places]
        return [_middle(int(partners[cell]), partners.shape) for cell in cells]

    def _wrong(self, places: Tensor) -> NDArray[np.bool_]:
        own = self.sample.seed.class_ids[self._place]
        truth = self._coarse((self._truth == own).float(), places) >= 0.5
        seed = self._coarse(self.seed.foreground[self._place], places) >= self.threshold
        return (truth != seed).numpy()


def _middle(cell: int, shape: tuple[int, ...]) -> tuple[float, float]:
    """Row and column of a cell's middle, as shares of height and width."""
    return (cell // shape[1] + 0.5) / shape[0], (cell % shape[1] + 0.5) / shape[1]
