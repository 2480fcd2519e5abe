"""A row for each update step, against the paper's: time and memory of one mask from nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import nn

from g4seg_pl.bench.rows import Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.timing import Spent, describe_pairs, interleaved, ratio
from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.grounding import Grounding
from g4seg_pl.core.likelihood import ChooseByLikelihood
from g4seg_pl.core.steps import Correspondence, UpdateStep
from g4seg_pl.lab.cost import PeakMemory
from g4seg_pl.recipes import steps_of
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import Sample

# As chosen on the embedded world's validation scenes with Grad-CAM seeds (docs/results.md).
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

BARS = {"affinity": 0.5, "gradient": 2.0}
MOST_GIGABYTES = 8.0
FULL_SIZE_ROUNDS = 2


def steps(setting: Setting) -> Iterator[Row]:
    """Yield each step's time over that of the paper's update, and its memory.

    Args:
        setting: size, place and rounds; at full size each is timed once or twice.
    """
    one, three = one_and_three_classes(setting)
    runs = {name: partial(refine_once, setting, each, one) for name, each in STEPS.items()}
    runs["affinity, 3 classes"] = partial(refine_once, setting, STEPS["affinity"], three)
    runs["paper, 3 classes"] = partial(refine_once, setting, STEPS["paper"], three)
    rounds = min(FULL_SIZE_ROUNDS, setting.rounds) if setting.size.full else setting.rounds
    yield from _memory_rows(setting, {name: runs[name] for name in STEPS})
    # The memory's runs have warmed up all there is.
    spent = interleaved(runs, rounds, setting.device, warm_up=False)
    yield from _time_rows(setting, spent)


def _memory_rows(setting: Setting, runs: "dict[str, partial[None]]") -> Iterator[Row]:
    # Before the first is watched: loading takes more than running.
    weights = _bytes(setting.generator) + _bytes(setting.features)
    for name, run in runs.items():
        with PeakMemory(setting.device) as memory:
            run()
        total = (memory.bytes + weights) / 1e9
        detail = f"weights {weights / 1e9:.3g} GB and {memory.bytes / 1e9:.3g} GB beyond; one mask"
        yield Row(f"steps: {name}, memory", total, "GB", setting.bar(MOST_GIGABYTES), detail)


def _time_rows(setting: Setting, spent: dict[str, list[Spent]]) -> Iterator[Row]:
    paper = spent["paper"]
    seconds = median(each.seconds for each in paper)
    detail = "encoding, features and text included, one mask, models loaded"
    yield Row("steps: paper", 1e3 * seconds, "ms", None, detail)
    for name in STEPS:
        if name != "paper":
            limit = BARS.get(name)
            bar = None if limit is None else setting.bar(limit)
            detail = describe_pairs(spent[name], paper)
            yield Row(f"steps: {name} / paper", ratio(spent[name], paper), "×", bar, detail)
    for name, limit in (("affinity", 1.1), ("paper", None)):
        over, under = spent[f"{name}, 3 classes"], spent[name]
        bar = None if limit is None else setting.bar(limit)
        row = f"steps: {name}, 3 classes / 1 class"
        yield Row(row, ratio(over, under), "×", bar, describe_pairs(over, under))


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
