"""Seeds by every maker of `g4seg_pl.seeds`, refined: the table of seeds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from g4seg_pl.core.background import BackgroundRule, PowerBackground, Threshold
from g4seg_pl.evaluation.confusion import mean_overlap
from g4seg_pl.lab.cam_weights import CamRecipe, cam_weights
from g4seg_pl.lab.chooser import LEAVES_PROBABILITIES, best_threshold
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.makers import LOWEST, MAKERS, MadeSource, MakerName
from g4seg_pl.lab.scores import THRESHOLDS, Scores, pooled
from g4seg_pl.lab.sources import SeedKind
from g4seg_pl.lab.stages import DenseCRF, Way
from g4seg_pl.lab.table import Cell, Table, line_row
from g4seg_pl.lab.tables.refinement import named

WAYS = ("g4seg", "dcrf", "g4seg+dcrf", "best", "best+dcrf", "feature-nn", "guided+colour-affinity")
LABELS: dict[MakerName, str] = {
    "cam": "CAM",
    "clip_es": "CLIP-ES",
    "maskclip": "MaskCLIP",
    "sclip": "SCLIP",
    "diffsegmenter": "DiffSegmenter",
}
# Whose settings the refiners have; the other makers' seeds are like Grad-CAM's.
SETTINGS: dict[MakerName, SeedKind] = {"diffsegmenter": "cross_attention"}
# What the background may enter a dense CRF with; None is the seeds' own rule.
CRF_BACKGROUNDS = (None, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
SEPARATOR = ", background "
VALIDATION_SCENES = 64
NOTE = (
    "Seeds are those of `g4seg predict -c configs/seeds/<maker>.yaml -c "
    "configs/seeds/world/<maker>.yaml`. `label rule` is what makes a row's labels: a class must "
    "exceed a threshold or CLIP-ES's (1 - max)^a; behind a dense CRF the most probable label, "
    "the background having entered it by that rule. MaskCLIP and SCLIP are not told which "
    "classes an image has, the others are; no maker has a word for the background, because the "
    "world's CLIP knows none. MaskCLIP's softmax is so sharp that its thresholds lie at the end "
    f"of the grid, {THRESHOLDS[-1]}. CAM's classifier begins with random weights, not with "
    "ImageNet's, and is trained for minutes, by `make lab` itself and in bfloat16: from one "
    "processor to another its rows moved by up to 3 points, all others of all tables by 0.2 at "
    "most."
)


@dataclass(frozen=True)
class Chosen:
    """What was chosen for a maker's seeds on validation scenes.

    Attributes:
        threshold: of the seed's labels.
        rule: of the seed, with that threshold.
        ways: each with its own threshold.
    """

    threshold: float
    rule: BackgroundRule
    ways: tuple[Way, ...]


def makers(lab: Lab, recipe: CamRecipe | None = None, scenes: int = VALIDATION_SCENES) -> Table:
    """Seeds of every maker, alone and refined with and without the dense CRF.

    Args:
        lab: models and store.
        recipe: of CAM's classifier.
        scenes: of validation, on which label thresholds are chosen.
    """
    recipe = recipe or CamRecipe()
    cam_weights(lab.store, recipe, quiet=lab.quiet)  # trained now, where its losses can be shown
    rows: list[dict[str, Cell]] = []
    for name in MAKERS:
        rows += _rows(lab, name, recipe, scenes)
    protocol = lab.protocol() | {
        "background": f"as the row says, chosen on validation scenes 0 to {scenes - 1}",
        "settings": "those chosen for gradcam seeds, DiffSegmenter's for cross_attention seeds",
    }
    title = "Coarse masks of every maker, refined"
    return Table("makers", title, tuple(rows), protocol, (NOTE,))


def _rows(lab: Lab, name: MakerName, recipe: CamRecipe, scenes: int) -> list[dict[str, Cell]]:
    chosen = choose_labels(lab, name, recipe, scenes)
    value = chosen.threshold
    source = MadeSource(lab.models, lab.store, name, "test", lab.images, lab.first, value, recipe)
    every = [Way("seed", background=value), *chosen.ways]
    found = lab.runner().run(every, source, chosen.rule, lab.noise_seeds)
    return [
        line_row(
            lab.line(way.name, found["seed"], found[way.name]),
            seeds=LABELS[name],
            **{"label rule": rule_text(name, chosen.rule, way)},
        )
        for way in every
    ]


def choose_labels(lab: Lab, name: MakerName, recipe: CamRecipe, scenes: int) -> Chosen:
    """Choose label thresholds of a maker's seeds and of every way to refine them.

    Behind a dense CRF the most probable label counts; there the background's score is chosen.

    Args:
        lab: models and store.
        name: of the maker.
        recipe: of CAM's classifier.
        scenes: of validation, from the first.
    """
    source = MadeSource(lab.models, lab.store, name, "val", scenes, 0, LOWEST, recipe)
    runner, noise = lab.runner(), lab.noise_seeds[:1]
    plain = runner.run([Way("seed")], source, Threshold(0.5), noise, curve=True)
    threshold, _ = best_threshold(plain["seed"])
    rule = rule_of(name, threshold)
    kind = SETTINGS.get(name, "gradcam")
    ways = [
        replace(candidate, background=None)
        for way in named(lab, kind, WAYS)
        for candidate in _with_crf_backgrounds(way)
    ]
    source = MadeSource(lab.models, lab.store, name, "val", scenes, 0, threshold, recipe)
    found = runner.run(ways, source, rule, noise, curve=True)
    return Chosen(threshold, rule, tuple(_chosen(ways, found)))


def _with_crf_backgrounds(way: Way) -> list[Way]:
    """The way, or one for each score that the background may enter its dense CRF with."""
    last = way.stages[-1]
    if not isinstance(last, DenseCRF):
        return [way]
    before = way.stages[:-1]
    return [
        replace(
            way,
            name=f"{way.name}{SEPARATOR}{value}",
            stages=(*before, replace(last, background=value)),
        )
        for value in CRF_BACKGROUNDS
    ]


def _chosen(ways: Sequence[Way], found: Mapping[str, Sequence[Scores]]) -> Iterator[Way]:
    """The best of the ways that differ in the background alone, with its label threshold."""
    for name, group in groupby(ways, lambda way: way.name.partition(SEPARATOR)[0]):
        best = max(group, key=lambda way: _miou(way, found[way.name]))
        yield replace(best, name=name, background=_own_threshold(best, found[best.name]))


def _miou(way: Way, runs: Sequence[Scores]) -> float:
    """In percent; behind a dense CRF of its own labels, else at the best threshold."""
    own = _own_threshold(way, runs) is None
    return 100 * mean_overlap(pooled(runs).overlaps) if own else best_threshold(runs)[1]


def rule_of(name: MakerName, threshold: float) -> BackgroundRule:
    """The maker's own kind of background rule, such that its labels have the threshold given.

    CLIP-ES has (1 - max)^a, and S exceeds (1 - S)^a where it exceeds the S at which both are
    equal: a = log S / log(1 - S).
    """
    if name == "clip_es":
        return PowerBackground(math.log(threshold) / math.log(1 - threshold))
    return Threshold(threshold)


def rule_text(name: MakerName, rule: BackgroundRule, way: Way) -> str:
    """What makes a row's labels, in words."""
    if way.background is not None:
        return _text(rule_of(name, way.background))
    last = way.stages[-1]
    if isinstance(last, DenseCRF) and last.background is not None:
        rule = Threshold(last.background)
    return f"most probable, {_text(rule)} before"


def _text(rule: BackgroundRule) -> str:
    if isinstance(rule, PowerBackground):
        return f"(1 - max)^{rule.power:.1f}"
    return f"threshold {rule.value:g}" if isinstance(rule, Threshold) else repr(rule)


def _own_threshold(way: Way, runs: Sequence[Scores]) -> float | None:
    """The best threshold of a way's labels; None where a dense CRF makes them."""
    if type(way.stages[-1]).__name__ in LEAVES_PROBABILITIES:
        return None
    return best_threshold(runs)[0]
