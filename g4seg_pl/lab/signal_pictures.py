"""One figure a signal, for docs/signals.md: what each knows about the same few masks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.correspondence import matched_target
from g4seg_pl.core.generation import groups_per_image
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.grounding import Grounding
from g4seg_pl.core.paired_losses import paired_losses
from g4seg_pl.core.refine import RefinementState, refine
from g4seg_pl.core.resize import min_max, resize_maps
from g4seg_pl.core.threshold import centre_threshold
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.stages import at_threshold
from g4seg_pl.lab.tables.refinement import correspondence_of
from g4seg_pl.report import pictures
from g4seg_pl.types import ConfigurationError, Sample

Columns = Mapping[str, Sequence[Image.Image]]
Step = TypeVar("Step", Affinity, Gradient, Grounding)
LOSS_TIMESTEPS, LOSS_DRAWS = (300, 500), 8


def signal_pictures(lab: Lab, folder: Path, count: int = 4) -> Path:
    """Write one PNG a signal, of the first test scenes that show a single class.

    Masks are of the lab's first kind of seeds.

    Args:
        lab: models, store and chosen settings; its first test scenes are searched.
        folder: where the pictures go.
        count: scenes a figure.
    """
    source = lab.source(lab.kinds[0])
    ids = source.ids[: 12 * count]
    samples = [s for s in source.samples(ids) if len(s.class_names) == 1][:count]
    context = lab.refiner().context(samples)
    seeds = torch.cat([sample.seed.scores for sample in samples]).to(context.images.device)
    threshold = lab.background(lab.kinds[0]).value
    draw: dict[str, Callable[[Tensor, RefinementContext, Lab], Columns]] = {
        "grounding": _grounding,
        "affinity": _affinity,
        "gradient": _gradient,
        "correspondence": _correspondence,
    }
    folder.mkdir(parents=True, exist_ok=True)
    shown = _always(samples, seeds, threshold)
    for name, columns in draw.items():
        _save(folder / f"{name}.png", shown | dict(columns(seeds, context, lab)))
    truth = torch.stack([_truth(sample) for sample in samples]).to(seeds)
    found = _likelihood(seeds, truth, context, threshold)
    _save(folder / "likelihood.png", shown | dict(found))
    return folder


def _always(
    samples: Sequence[Sample], seeds: Tensor, threshold: float
) -> dict[str, Sequence[Image.Image]]:
    return {
        "image": [Image.fromarray(s.image.permute(1, 2, 0).numpy()) for s in samples],
        "truth": [pictures.heat(_truth(s).float().numpy()) for s in samples],
        "seed, its threshold white": _heats(centre_threshold(seeds, threshold)),
    }


def _grounding(seeds: Tensor, context: RefinementContext, lab: Lab) -> Columns:
    step, threshold = _step(lab, "grounding", Grounding), lab.background(lab.kinds[0]).value
    words = replace(step, mixing=1.0, threshold=0.5)(seeds, context)
    mixed = centre_threshold(step(seeds, context), threshold)
    return {"where the word points": _heats(words), "mixed": _heats(mixed)}


def _affinity(seeds: Tensor, context: RefinementContext, lab: Lab) -> Columns:
    step, threshold = _step(lab, "affinity", Affinity), lab.background(lab.kinds[0]).value
    images = tuple(range(len(seeds)))
    prompts = step.prompts_of(groups_per_image(context), context)
    _, matrix = step.matrices(images, prompts, context)[0]
    peak = functional.adaptive_avg_pool2d(seeds, matrix.grid).flatten(1).argmax(1)
    # A times every unit vector is A itself: 256 places here, so it may be looked at whole.
    unit = torch.eye(matrix.grid[0] * matrix.grid[1], device=seeds.device)
    whole = matrix.propagate(unit.expand(len(seeds), -1, -1))
    rows = torch.stack([whole[i, :, int(at)] for i, at in enumerate(peak)])
    looked = min_max(resize_maps(rows.reshape(-1, *matrix.grid), (seeds.shape[1], seeds.shape[2])))
    after = centre_threshold(step(seeds, context), threshold)
    return {"where its peak looks": _heats(looked), "after one step": _heats(after)}


def _gradient(seeds: Tensor, context: RefinementContext, lab: Lab) -> Columns:
    step, threshold = _step(lab, "gradient", Gradient), lab.background(lab.kinds[0]).value
    centred = centre_threshold(seeds, threshold)
    one = centre_threshold(replace(step, iterations=1)(seeds, context), threshold)
    four = centre_threshold(step(seeds, context), threshold)
    return {
        "first step: red grows": _heats(_signed(one - centred)),
        f"after {step.iterations} steps": _heats(four),
    }


def _correspondence(seeds: Tensor, context: RefinementContext, lab: Lab) -> Columns:
    step, _ = correspondence_of(lab, lab.kinds[0])
    threshold = lab.background(lab.kinds[0]).value
    kept: dict[str, Tensor] = {}

    def keep(state: RefinementState) -> None:
        kept.update(state.artifacts)

    after = refine(seeds, context, [at_threshold(step, threshold)], keep)
    grid = (kept["neighbours"].shape[1], kept["neighbours"].shape[2])
    coarse = functional.adaptive_avg_pool2d(seeds, grid)
    target = matched_target(coarse, kept["neighbours"].flatten(1))
    generated = ((kept["generated"].cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return {
        "generated": [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in generated],
        "S at the best match": _heats(centre_threshold(target, threshold)),
        "after the update": _heats(centre_threshold(after, threshold)),
    }


def _likelihood(
    seeds: Tensor, truth: Tensor, context: RefinementContext, threshold: float
) -> Columns:
    """Where the loss is lower under the truth than under the seed, and by how much in all."""
    found = paired_losses(
        [centre_threshold(seeds, threshold), truth],
        context,
        LOSS_TIMESTEPS,
        LOSS_DRAWS,
        keep_maps=True,
    )
    assert found.maps is not None
    saved = (found.maps[0] - found.maps[1]).mean(1)
    smooth = resize_maps(saved, (seeds.shape[1], seeds.shape[2]))
    return {"truth explains better: red": _heats(_signed(smooth))}


def _step(lab: Lab, name: str, kind: type[Step]) -> Step:
    """The chosen step of a way, its masks' threshold in it."""
    step = at_threshold(lab.way(lab.kinds[0], name).stages[0], lab.background(lab.kinds[0]).value)
    if not isinstance(step, kind):
        message = f"the way {name} begins with a {type(step).__name__}, not a {kind.__name__}"
        raise ConfigurationError(message)
    return step


def _truth(sample: Sample) -> Tensor:
    assert sample.truth is not None
    return sample.truth == sample.seed.class_ids[0]


def _signed(change: Tensor) -> Tensor:
    """Each map of changes with 0 at one half and its largest change at 0 or 1."""
    largest = change.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)
    return 0.5 + 0.5 * change / largest


def _heats(maps: Tensor) -> list[Image.Image]:
    return [pictures.heat(each.float().cpu().numpy().astype(np.float32)) for each in maps]


def _save(path: Path, columns: Columns) -> None:
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    sheet = pictures.grid(rows, list(columns))
    partial = path.with_suffix(".part.png")
    sheet.save(partial)
    partial.replace(path)
