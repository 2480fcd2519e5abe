"""A row for each update step, against the paper's: time and memory of one mask from nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from g4seg_pl.bench.rows import Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.timing import Spent, describe_pairs, interleaved, middle, ratio
from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.grounding import Grounding
from g4seg_pl.core.likelihood import ChooseByLikelihood
from g4seg_pl.core.steps import Correspondence, UpdateStep
from g4seg_pl.lab.cost import PeakMemory
from g4seg_pl.recipes import steps_of
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import Sample

# As once chosen on the embedded world's validation scenes with Grad-CAM seeds; the present choice
# (docs/results.md) draws noise twice, which would say nothing of the step's own cost.
AFFINITY = Affinity(
    timestep=100,
    power=2.0,
    form="heads",
    norm="range",
    level_weights=(1.0, 1.0),
    prompt="classes",
    upsampling="joint_bilateral",
    edge_epsilon=3e-3,
)
STEPS: dict[str, tuple[UpdateStep, ...]] = {
    "paper": (Correspondence(),),
    "affinity": (AFFINITY,),
    "grounding": (next(step for step in steps_of("best") if isinstance(step, Grounding)),),
    "gradient": (Gradient(iterations=4),),
    "likelihood": (ChooseByLikelihood([[]]),),
    "best": steps_of("best"),
}
"""``likelihood`` judges the mask given against the empty one, with two draws of noise."""

BARS = {"affinity": 0.5, "gradient": 2.0, "affinity, 3 classes": 1.1}
MOST_GIGABYTES = 8.0
FULL_SIZE_ROUNDS = 3


def steps(setting: Setting) -> Iterator[Row]:
    """Yield each step's time over that of the paper's update, and its memory.

    Args:
        setting: size, place and rounds; at full size each is timed three times at most.
    """
    one, three = one_and_three_classes(setting)
    runs = {name: partial(refine_once, setting, each, one) for name, each in STEPS.items()}
    for name in ("affinity", "paper"):
        runs[f"{name}, 3 classes"] = partial(refine_once, setting, STEPS[name], three)
    timed = _wanted(setting, {row: pair for row, *pair in _ratios()} | {"steps: paper": ["paper"]})
    weighed = _wanted(setting, {_memory_name(name): [name] for name in STEPS})
    yield from _memory_rows(setting, {name: runs[name] for name in runs if name in weighed})
    rounds = min(FULL_SIZE_ROUNDS, setting.rounds) if setting.size.full else setting.rounds
    # Being weighed has warmed up what is timed.
    for name in timed - weighed:
        if name in STEPS:
            runs[name]()
    runs = {name: run for name, run in runs.items() if name in timed}
    if runs:
        spent = interleaved(runs, rounds, setting.device, warm_up=False)
        yield from _time_rows(setting, spent)


def _ratios() -> list[tuple[str, str, str]]:
    """Return the rows that compare two runs: their names, the run above and the run below."""
    found = [(f"steps: {name} / paper", name, "paper") for name in STEPS if name != "paper"]
    for name in ("affinity", "paper"):
        found.append((f"steps: {name}, 3 classes / 1 class", f"{name}, 3 classes", name))
    return found


def _memory_name(name: str) -> str:
    return f"steps: {name}, memory"


def _wanted(setting: Setting, rows: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the runs that the rows asked for need."""
    return {run for row, needed in rows.items() if setting.wants(row) for run in needed}


def _memory_rows(setting: Setting, runs: "dict[str, partial[None]]") -> Iterator[Row]:
    # Before the first is watched: loading takes more than running.
    weights = _bytes(setting.generator) + _bytes(setting.features)
    for name, run in runs.items():
        with PeakMemory(setting.device) as memory:
            run()
        total = (memory.bytes + weights) / 1e9
        detail = f"weights {weights / 1e9:.3g} GB and {memory.bytes / 1e9:.3g} GB beyond; one mask"
        yield Row(_memory_name(name), total, "GB", setting.bar(MOST_GIGABYTES), detail)


def _time_rows(setting: Setting, spent: dict[str, list[Spent]]) -> Iterator[Row]:
    if "paper" in spent:
        seconds = middle(spent["paper"])
        detail = "encoding, features and text included, one mask, models loaded"
        yield Row("steps: paper", 1e3 * seconds, "ms", None, detail)
    for row, over, under in _ratios():
        if over in spent and under in spent:
            limit = BARS.get(over)
            bar = None if limit is None else setting.bar(limit)
            detail = describe_pairs(spent[over], spent[under])
            yield Row(row, ratio(spent[over], spent[under]), "×", bar, detail)


def _bytes(network: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in network.parameters())


def refine_once(setting: Setting, update: Sequence[UpdateStep], sample: Sample) -> None:
    """Refine an image from nothing, models loaded.

    Args:
        setting: whose models.
        update: the steps.
        sample: the image with its seeds.
    """
    refiner = G4SegRefiner(setting.generator, setting.features, update)
    with torch.no_grad():
        refiner.refine_samples([sample])


def one_and_three_classes(setting: Setting) -> tuple[Sample, Sample]:
    """An image of one class, and the same image with three.

    Args:
        setting: whose inputs.
    """
    names = list(setting.inputs.counts)
    data = setting.inputs.data((names[2],))
    data.setup()
    (batch,) = data.predict_dataloader()
    three = batch[0]
    if not isinstance(three, Sample):
        raise TypeError(three.error)
    seed = replace(three.seed, class_ids=three.seed.class_ids[:1], scores=three.seed.scores[:1])
    return replace(three, seed=seed, class_names=three.class_names[:1]), three
