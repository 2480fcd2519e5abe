"""Tables of ways side by side: modules, sensitivity, refiners, signals, controls."""

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch

from g4seg_pl.core.steps import Correspondence
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.lab.controls import TruthInjected, WithFeatures
from g4seg_pl.lab.cost import cost_of
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.sources import SeedKind
from g4seg_pl.lab.stages import Stage, Way
from g4seg_pl.lab.table import Cell, Table, line_row
from g4seg_pl.lab.written import build_object, object_text

SIGNALS = ("grounding", "affinity", "gradient", "g4seg")
CONTROLS = (
    "blur",
    "feature-nn",
    "no-injection",
    "noise-only",
    "reconstruction",
    "blurred-image",
    "guided",
    "joint-bilateral",
    "random-walk",
    "colour-affinity",
    "guided+colour-affinity",
    "word",
    "word+guided+colour-affinity",
    "feature-affinity",
    "clip-affinity",
    "random-latent",
    "dcrf",
)
TIMESTEPS = (100, 200, 300, 400, 500, 600, 700)
# What is changed one at a time about the paper's update at its chosen setting.
AXES: dict[str, tuple[Any, ...]] = {
    "timestep": TIMESTEPS,
    "injection_weight": (0.0, 5.0, 10.0, 20.0, 50.0),
    "beta": (0.9, 0.8, 0.65, 0.5, 0.3, 0.0),
    "confidence_range": (None, (0.1, 0.7), (0.2, 0.6), (0.3, 0.7)),
    "match_size": (None, 8, 16, 32),
    "guidance_scale": (1.0, 3.0, 7.5),
    "matching": ("generated_to_image", "aligned", "self"),
}
# What the paper leaves open; shown on the first kind of seeds alone, to spare a tenth of the time.
READINGS: dict[str, tuple[Any, ...]] = {
    "carry": ("difference", "values"),
    "all_classes_at_once": (False, True),
    "noise_per": ("class", "image"),
    "injection_rule": ("eq5", "dense_diffusion"),
}


def ways_on(
    lab: Lab, name: str, title: str, by_kind: Iterable[tuple[SeedKind, Sequence[Way]]], note: str
) -> Table:
    """A table of ways on kinds of seeds."""
    rows: list[dict[str, Cell]] = []
    kinds = []
    for kind, ways in by_kind:
        kinds.append(kind)
        rows += [line_row(each, seeds=kind) for each in lab.lines(kind, ways)]
    return Table(name, title, tuple(rows), lab.protocol(*kinds), (note,))


def named(lab: Lab, kind: SeedKind, names: Iterable[str]) -> list[Way]:
    """The ways of these names that were chosen for a kind of seeds."""
    return [lab.way(kind, name) for name in names if lab.has(kind, name)]


def correspondence_of(lab: Lab, kind: SeedKind) -> tuple[Correspondence, Way]:
    """The paper's update at its chosen setting, and the way it is the only stage of.

    Raises:
        TypeError: the way ``g4seg`` was chosen to be something else.
    """
    way = lab.way(kind, "g4seg")
    step = way.stages[0]
    if not isinstance(step, Correspondence):
        message = f"the way g4seg begins with a {type(step).__name__}; it is the paper's update"
        raise TypeError(message)
    return step, way


def modules(lab: Lab) -> Table:
    """Which part of the paper's update does what (Table III), with its controls and an oracle."""
    by_kind = []
    for kind in lab.kinds:
        step, way = correspondence_of(lab, kind)
        open_step = replace(step, confidence_range=None)
        variants: dict[str, Stage] = {
            "EMI only (same place)": replace(open_step, matching="aligned"),
            "SCA only (injection off)": replace(open_step, injection_weight=0.0),
            "EMI + SCA": open_step,
            "EMI + SCA + CF [0.2, 0.6]": replace(step, confidence_range=(0.2, 0.6)),
            "EMI + SCA + CF [0.1, 0.7]": replace(step, confidence_range=(0.1, 0.7)),
            "oracle: truth injected": TruthInjected(open_step),
        }
        ways = [Way(name, (each,), way.background) for name, each in variants.items()]
        by_kind.append((kind, [*ways, *named(lab, kind, ("feature-nn", "blur"))]))
    note = "All rows but the controls share the settings chosen for g4seg."
    return ways_on(lab, "modules", "Modules of the paper's update (Table III)", by_kind, note)


def sensitivity(lab: Lab) -> Table:
    """The paper's update with one setting changed at a time (Fig. 4 among them)."""
    rows: list[dict[str, Cell]] = []
    once = replace(lab, noise_seeds=lab.noise_seeds[:1])
    for kind in lab.kinds:
        step, way = correspondence_of(lab, kind)
        first = kind == lab.kinds[0]
        changed = [
            Way(f"{name} = {value}", (_changed(step, name, value),), way.background)
            for name, values in (AXES | (READINGS if first else {})).items()
            for value in values
        ]
        spaces = [
            Way(f"features = {text}", (WithFeatures([step], other),), way.background)
            for text, other in _feature_spaces(lab)
        ]
        ways = [way, *changed, *named(lab, kind, ("feature-nn", "blur"))]
        lines = lab.lines(kind, [*ways, *(spaces if first else ())])
        if spaces and not first:
            lines += once.lines(kind, spaces)[1:]  # the seed is there already
        rows += [line_row(each, seeds=kind) for each in lines]
    notes = (
        "Shown on test scenes; nothing is chosen from this table.",
        "Beyond the first kind of seeds, feature spaces have one noise seed, to spare time.",
        "DenseDiffusion's rule has its λ at 1, full strength: Eq. 5's w is of another unit.",
    )
    title = "The paper's update, one setting changed at a time"
    return Table("sensitivity", title, tuple(rows), lab.protocol(*lab.kinds), notes)


def _changed(step: Correspondence, name: str, value: Any) -> Correspondence:
    """The step with one setting changed; DenseDiffusion's rule at full strength, λ = 1."""
    weight: dict[str, Any] = {"injection_weight": 1.0} if value == "dense_diffusion" else {}
    return replace(step, **{name: value}, **weight)


def _feature_spaces(lab: Lab) -> Iterator[tuple[str, DenseFeatures]]:
    """Every F of Eq. 8 among which one was chosen, as text and as an extractor."""
    for each in lab.chosen.get("features", {}).get("tried", ()):
        yield object_text(each["features"]), build_object(each["features"], lab.places)


def refiners(lab: Lab) -> Table:
    """The paper's update, the best recipe, dCRF and their chains (Table XI)."""
    chains = ("g4seg", "dcrf", "g4seg+dcrf", "dcrf+g4seg", "best", "best+dcrf", "dcrf+best")
    by_kind = [(kind, named(lab, kind, (*chains, *CONTROLS[:-1]))) for kind in lab.kinds]
    title = "Refiners side by side and in chains (Table XI)"
    note = "`best` is the recipe chosen on validation scenes; controls stay in every table."
    return ways_on(lab, "refiners", title, by_kind, note)


def orders() -> Iterator[str]:
    """Every order of one, two and three signals, alone, before and after the dense CRF."""
    for length in (1, 2, 3):
        for order in permutations(SIGNALS, length):
            chain = "+".join(order)
            yield from (chain, f"{chain}+dcrf", f"dcrf+{chain}")


def signals(lab: Lab) -> Table:
    """Each signal alone, every order of two and three, with and without dCRF."""
    names = (*orders(), "dcrf", "feature-nn", "blur")
    by_kind = [(kind, named(lab, kind, names)) for kind in lab.kinds]
    title = "Signals, alone and in every order, with and without dCRF"
    note = "Chains are put together from parts chosen by themselves."
    return ways_on(lab, "signals", title, by_kind, note)


def controls(lab: Lab) -> Table:
    """Every control at its best setting, and how far the best recipe is above it."""
    rows: list[dict[str, Cell]] = []
    for kind in lab.kinds:
        found = lab.scores(kind, named(lab, kind, ("best", *SIGNALS, *CONTROLS)))
        for name, runs in found.items():
            row = line_row(lab.line(name, found["seed"], runs), seeds=kind)
            if "best" in found:
                best = lab.line("best", runs, found["best"])
                row |= {"best over it": best.gain, "best over it_se": best.gain_se}
            rows.append(row)
    title = "Every control at its best setting"
    protocol = lab.protocol(*lab.kinds)
    return Table("controls", title, tuple(rows), protocol, signed=("gain", "best over it"))


def costs(lab: Lab) -> Table:
    """Seconds and memory of every chosen way on this machine, at the world's size."""
    kind = lab.kinds[0]
    source = lab.source(kind)
    samples = source.samples(source.ids[:8])
    refiner, rule = lab.refiner(), lab.background(kind)
    rows: list[dict[str, Cell]] = []
    for way in named(lab, kind, (*SIGNALS, "best", *CONTROLS)):
        cost = cost_of(way, refiner, samples, rule)
        row: dict[str, Cell] = {"way": way.name, "s/mask": cost.seconds}
        rows.append(row | {"MB a batch of 8": cost.megabytes, "masks": cost.masks})
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    protocol = {"machine": machine, "counted": "encoding, features and all stages"}
    return Table("costs", "What a way costs, models loaded", tuple(rows), protocol)
