"""Running a way on a batch: what several ways begin with, or generate, is computed once."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import cast

import torch
from torch import Tensor

from g4seg_pl.callbacks.run_record import describe
from g4seg_pl.core.background import Threshold, compose_label
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.protocols import Generator
from g4seg_pl.core.refine import refine
from g4seg_pl.core.resize import apply_change, masks_to_working
from g4seg_pl.lab.cache import canonical
from g4seg_pl.lab.generated import Generated, KeptPasses, sharing
from g4seg_pl.lab.stages import (
    Batch,
    Masks,
    NativeStage,
    Remainder,
    Stage,
    Way,
    at_threshold,
)
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import Sample


@dataclass
class WatchedContext(RefinementContext):
    """A context that notices when a step draws noise.

    Attributes:
        drawn: one entry a call; shared by all variants of the context.
        features_by_extractor: F(x₀) of other extractors, shared by all noise seeds.
    """

    drawn: list[int] = field(default_factory=list)
    features_by_extractor: dict[str, Tensor] = field(default_factory=dict)

    def noise(self, image_ids: tuple[str, ...], names: tuple[str, ...], draw: int = 0) -> Tensor:
        """Return ε as the plain context does."""
        self.drawn.append(draw)
        return super().noise(image_ids, names, draw)


@dataclass(frozen=True)
class State:
    """How far a chain has come.

    Attributes:
        masks: at native size, before the steps that are still at working size.
        entry: the masks as those steps were given them; None between native stages.
        working: the same masks after them.
        seconds: spent on the stages, whatever other ways share of them.
        noisy: whether any stage drew noise.
    """

    masks: Masks
    entry: Tensor | None = None
    working: Tensor | None = None
    seconds: float = 0.0
    noisy: bool = False

    def settled(self) -> "State":
        """Return the state with everything at native size."""
        if self.entry is None or self.working is None:
            return self
        counts = [len(each) for each in self.masks.foreground]
        before = torch.split(self.entry.float().cpu(), counts)
        after = torch.split(self.working.float().cpu(), counts)
        native = zip(self.masks.foreground, before, after, strict=True)
        foreground = tuple(apply_change(*each) for each in native)
        return replace(
            self, masks=Masks(foreground, self.masks.background), entry=None, working=None
        )


class ChainRunner:
    """Refines one batch by many ways under one noise seed.

    Args:
        batch: the images; latents and features are computed once for all ways and noise seeds.
        seeds: the coarse masks with their rule.
        noise_seed: from which all noise derives.
    """

    def __init__(self, batch: Batch, seeds: Masks, noise_seed: int = 0) -> None:
        context = copy.copy(batch.context)
        context.seed = noise_seed
        self._generated = Generated()
        context.generator = cast(Generator, KeptPasses(context.generator, self._generated))
        self.batch = Batch(batch.samples, context)
        self._states: dict[str, State] = {"": State(seeds)}

    def run(self, way: Way) -> State:
        """Return the way's masks at native size, labels by its own rule."""
        done, state = "", self._states[""]
        for stage in way.stages:
            done += canonical(describe(stage)) + "\n"
            if done not in self._states:
                self._states[done] = self._advance(stage, state)
            state = self._states[done]
        state = state.settled()
        if way.background is not None and not isinstance(state.masks.background, Remainder):
            masks = Masks(state.masks.foreground, Threshold(way.background))
            state = replace(state, masks=masks)
        return state

    def _advance(self, stage: Stage, state: State) -> State:
        context = self.batch.context
        drawn = len(context.drawn) if isinstance(context, WatchedContext) else 0
        spared, hidden = self._generated.spared, self._generated.hidden
        started = time.perf_counter()
        if isinstance(stage, NativeStage):
            settled = state.settled()
            after = replace(settled, masks=stage.refine_native(settled.masks, self.batch))
        else:
            after = self._step(stage, state)
        spared = self._generated.spared - spared
        seconds = state.seconds + time.perf_counter() - started + spared
        # A context that does not watch is taken to have drawn; so is noise in an image it kept.
        quiet = isinstance(context, WatchedContext) and len(context.drawn) == drawn
        quiet = quiet and self._generated.hidden == hidden
        return replace(after, seconds=seconds, noisy=state.noisy or not quiet)

    def _step(self, stage: Stage, state: State) -> State:
        working = state.working
        if working is None:
            images = self.batch.context.images
            size = (images.shape[2], images.shape[3])
            entered = [masks_to_working(each, size) for each in state.masks.foreground]
            working = torch.cat(entered).to(images.device)
            state = replace(state, entry=working)
        step = sharing(at_threshold(stage, state.masks.threshold), self._generated)
        return replace(state, working=refine(working, self.batch.context, [step]))


def make_batch(refiner: G4SegRefiner, samples: Sequence[Sample], *, warm: bool = True) -> Batch:
    """Return a batch of samples, each with at least one class.

    Args:
        refiner: the models.
        samples: the images.
        warm: compute latents and features now, so that all copies of the context share them.
    """
    plain = refiner.context(samples)
    values = {each.name: getattr(plain, each.name) for each in fields(plain) if each.init}
    context = WatchedContext(**values)
    if warm:
        for name in ("latents", *(("reference_features",) if context.features else ())):
            getattr(context, name)  # kept by the context once it was asked for
    return Batch(tuple(samples), context)


def labels_of(masks: Masks, samples: Sequence[Sample]) -> list[Tensor]:
    """Return the label map of every sample."""
    pairs = zip(masks.foreground, samples, strict=True)
    return [compose_label(soft, each.seed.class_ids, masks.background) for soft, each in pairs]
