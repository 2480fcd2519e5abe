"""Which of two masks is better, without any truth: likelihood's two scores beside controls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.nn import functional

from g4seg_pl.callbacks.run_record import Json, describe
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.evidence import ClassEvidence
from g4seg_pl.core.resize import masks_to_working
from g4seg_pl.lab.chain import ChainRunner
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.sources import SeedKind
from g4seg_pl.lab.stages import Batch, Masks, Way
from g4seg_pl.lab.table import Cell, Table
from g4seg_pl.lab.tables.explanation import (
    SPOILT,
    Arrays,
    Candidates,
    Floats,
    Measurement,
    explain,
    hard_masks,
    kept_by_batch,
    true_and_spoilt,
)
from g4seg_pl.lab.tables.groups import clustered_mean
from g4seg_pl.lab.tables.refinement import SIGNALS, named

BINS = ((0.0, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 1.01), (0.05, 1.01))
APART = 0.05  # pairs by name whose IoU differs by less do not count
TRUE = ("truth", *(f"truth, {fault}" for fault in SPOILT))
WORD_WEIGHT = 1.0
# Cells of the grid on which a mask's cut through colours is measured, and its two widths.
CUT_GRID, CUT_COLOUR, CUT_POSITION = 32, 0.1, 0.2


@dataclass(frozen=True)
class Judged:
    """Candidate masks with their IoU and what each judge says about them.

    Attributes:
        names: of the candidates, ways first, then the truth and the truth spoilt.
        ways: how many of them are ways.
        scores: ``(k, m)`` of every judge; higher is better. Not a number where a judge is silent.
        ious: ``(k, m)``.
        areas: ``(k, m)``, share of the image.
        image: ``(m,)``, index of each mask's image.
    """

    names: tuple[str, ...]
    ways: int
    scores: Mapping[str, Floats]
    ious: Floats
    areas: Floats
    image: NDArray[np.int64]


def likelihood(
    lab: Lab, how: Measurement | None = None, evidence: ClassEvidence | None = None
) -> Table:
    """How often each judge picks the better of two, what choosing by it gains, rank correlation.

    Args:
        lab: models and store.
        how: the denoising loss under the candidates.
        evidence: the evidence for the class's name.
    """
    how = how or Measurement(timesteps=(300, 500))
    evidence = ClassEvidence() if evidence is None else evidence
    rows: list[dict[str, Cell]] = []
    for kind in lab.kinds:
        found = judge(lab, kind, how, evidence)
        rows += [{"seeds": kind} | row for row in _pair_rows(found)]
        rows += [{"seeds": kind} | row for row in _choice_rows(lab, found)]
        rows += [{"seeds": kind} | row for row in _correlation_rows(found)]
    title = "Likelihood: picking the better of two masks, choosing among ways, predicting IoU"
    passes = len(evidence.timesteps) * evidence.draws
    notes = (
        "`loss` is the denoising loss with each candidate injected, `evidence` the denoising "
        "evidence for the class's name that each candidate explains, with nothing injected, and "
        f"`evidence + word` the same with the word map added at weight {WORD_WEIGHT:g}. "
        f"`loss` costs {how.draws * len(how.timesteps)} passes a candidate, `evidence` {passes} a "
        f"mask and {passes} an image however many candidates there are.",
        "Controls: the larger mask; agreement with the soft coarse mask (IoU); the cut through "
        "colours (normalised, the smaller the better); agreement with the mask of the best recipe "
        "(IoU); always the way that gained more on validation scenes.",
        "`right` is how often the better of two masks of one class of one image is picked, in "
        "percent; pairs are any two ways' masks unless the row names them, and pairs by name "
        "differ by 5 IoU at least. A judge that cannot tell two masks apart is right in half of "
        "the cases. Correlations are Spearman's: with IoU over the ways' masks of one class of "
        "one image (mean), over all of them, over the seeds alone, and with the mask's area.",
    )
    protocol = dict(lab.protocol(*lab.kinds))
    return Table("likelihood", title, tuple(rows), protocol, notes, ("mean IoU gain",))


def judge(lab: Lab, kind: SeedKind, how: Measurement, evidence: ClassEvidence) -> Judged:
    """Judge the masks of all ways, the truth and the truth spoilt, on the lab's test scenes."""
    ways = named(lab, kind, (*SIGNALS, "feature-nn", "best", "dcrf"))
    every = [Way("seed"), *ways]
    kept: dict[tuple[str, ...], dict[str, Tensor]] = {}

    def refined(batch: Batch, chains: ChainRunner) -> dict[str, Tensor]:
        """Return every way's masks, refined once for both of the measurements below."""
        ids = batch.context.image_ids
        if ids not in kept:
            kept[ids] = {way.name: hard_masks(batch, chains.run(way).masks) for way in every}
        return kept[ids]

    def candidates(batch: Batch, chains: ChainRunner) -> dict[str, Tensor]:
        found = refined(batch, chains)
        return found | {"empty": torch.zeros_like(found["seed"])}

    described = [[way.name, way.describe()] for way in ways]
    explained = explain(lab, kind, described, candidates, how)
    true = explain(lab, kind, "truth and spoilt", true_and_spoilt, how)
    # The last is the empty mask.
    losses = np.concatenate([explained.logarithms()[:-1], true.logarithms()])
    ious = np.concatenate([explained.ious[:-1], true.ious])
    names = (*(way.name for way in every), *TRUE)
    measured = _measured(lab, kind, refined, evidence, described)
    areas = measured.pop("area")
    order = np.full(len(names), np.nan)
    order[: len(every)] = [_validation_gain(lab, kind, way.name) for way in every]
    scores = {"loss": -losses, **measured, "area": areas}
    scores["validation order"] = np.repeat(order[:, None], ious.shape[1], axis=1)
    return Judged(names, len(every), scores, ious, areas, explained.image)


def _validation_gain(lab: Lab, kind: SeedKind, name: str) -> float:
    if name == "seed":
        return 0.0
    kinds = lab.chosen["kinds"]
    return float(kinds[lab.chosen.get("same_as", {}).get(kind, kind)]["ways"][name]["val_gain"])


def _measured(
    lab: Lab, kind: SeedKind, refined: Candidates, evidence: ClassEvidence, described: Json
) -> dict[str, Floats]:
    """Return what every judge that needs the masks themselves says, kept on disk."""

    def measure(batch: Batch, seeds: Masks) -> Arrays:
        chains = ChainRunner(batch, seeds)
        found = {**refined(batch, chains), **true_and_spoilt(batch, chains)}
        return {**_scores(batch, seeds, found, evidence)}

    what: dict[str, Json] = {
        "candidates": [described, list(TRUE)],
        "evidence": describe(evidence),
        "others": [WORD_WEIGHT, CUT_GRID, CUT_COLOUR, CUT_POSITION],
    }
    parts = [
        {name: each.astype(np.float64) for name, each in saved.items()}
        for saved in kept_by_batch(lab, kind, "judged", what, measure)
    ]
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def _scores(
    batch: Batch, seeds: Masks, found: Mapping[str, Tensor], evidence: ClassEvidence
) -> dict[str, Floats]:
    context = batch.context
    size = (context.images.shape[2], context.images.shape[3])
    masks = [masks_to_working(each, size).to(context.images.device) for each in found.values()]
    soft = torch.cat([masks_to_working(each, size) for each in seeds.foreground]).to(masks[0])
    passes = evidence.passes(context)
    plain = evidence.shares(masks, context, passes)
    worded = replace(evidence, word_weight=WORD_WEIGHT).shares(masks, context, passes)
    stacked = torch.stack(masks)
    best = masks[list(found).index("best")] if "best" in found else soft
    made = {
        "evidence": plain.shares.mean(-1),
        "evidence + word": worded.shares.mean(-1),
        "area": stacked.mean((2, 3)),
        "coarse mask": _soft_iou(stacked, soft),
        "colour cut": -_normalised_cut(stacked, context),
        "best's mask": _soft_iou(stacked, best),
    }
    return {name: each.double().cpu().numpy() for name, each in made.items()}


def _soft_iou(masks: Tensor, other: Tensor) -> Tensor:
    """Return Σ min / Σ max of every mask and another, ``(k, m)``; 1 if both are empty."""
    shared = torch.minimum(masks, other).sum((2, 3))
    union = torch.maximum(masks, other).sum((2, 3))
    return torch.where(union > 0, shared / union.clamp_min(1e-9), torch.ones_like(union))


def _normalised_cut(masks: Tensor, context: RefinementContext) -> Tensor:
    """Return Shi and Malik's cut(S, rest) / assoc(S) + cut / assoc(rest), ``(k, m)``.

    The affinity of two cells is a Gaussian of their difference in colour and in position. An
    empty or full mask cuts nothing apart; it gets 2, the worst there is.
    """
    grid = (CUT_GRID, CUT_GRID)
    pictures = functional.adaptive_avg_pool2d((context.images + 1) / 2, grid)
    places = torch.linspace(0, 1, CUT_GRID, device=pictures.device)
    where = torch.stack(torch.meshgrid(places, places, indexing="ij"))
    cells = functional.adaptive_avg_pool2d(masks, grid).flatten(2)
    found = []
    for mask, image in enumerate(context.owner.tolist()):
        points = torch.cat([pictures[image] / CUT_COLOUR, where / CUT_POSITION]).flatten(1).T
        affinity = torch.exp(-torch.cdist(points, points).square() / 2)
        inside = cells[:, mask]
        degree = affinity.sum(0)
        within = torch.einsum("kn,nm,km->k", inside, affinity, inside)
        held, total = inside @ degree, degree.sum()
        cut, rest = held - within, total - held
        one_sided = (held <= 0) | (rest <= 1e-6 * total)
        value = cut / held.clamp_min(1e-9) + cut / rest.clamp_min(1e-9)
        found.append(torch.where(one_sided, torch.full_like(value, 2.0), value))
    return torch.stack(found, dim=1)


def right(found: Judged, name: str, pairs: Sequence[tuple[int, int]]) -> tuple[Floats, Floats]:
    """Return, for every pair and mask of different IoU, whether a judge is right, and the gap.

    Args:
        found: the judged masks.
        name: of the judge.
        pairs: of candidates.

    Returns:
        1 for right, 0 for wrong, 0.5 if the judge cannot tell, not a number if it is silent; and
        the distance in IoU.
    """
    score = found.scores[name]
    rights, gaps = [], []
    for first, second in pairs:
        gap = found.ious[first] - found.ious[second]
        said = score[first] - score[second]
        picked = np.where(said == 0, 0.5, (gap > 0) == (said > 0))
        picked = np.where(np.isnan(said), np.nan, picked)
        rights.append(picked[gap != 0])
        gaps.append(np.abs(gap[gap != 0]))
    return np.concatenate(rights), np.concatenate(gaps)


def _pair_rows(found: Judged) -> Iterator[dict[str, Cell]]:
    between = list(combinations(range(found.ways), 2))
    for low, high in BINS:
        span = f"{100 * low:.0f}-{min(100.0, 100 * high):.0f}"
        yield _right_row(found, f"right, IoU apart by {span}", between, low, high)
    # `gradient` moves masks down the very loss that `loss` judges by.
    fitted = [i for i, name in enumerate(found.names) if name == "gradient"]
    apart = [pair for pair in between if not set(pair) & set(fitted)]
    if fitted:
        yield _right_row(found, "right, 5-100, without gradient", apart)
    for first in range(found.ways):
        mine = [pair for pair in between if first in pair]
        yield _right_row(found, f"right, {found.names[first]} against the others", mine)
    truth = found.ways
    for other in (*range(found.ways), *range(truth + 1, len(found.names))):
        name = f"right, truth against {found.names[other]}"
        yield _right_row(found, name, [(truth, other)])
    spoilt = list(combinations(range(truth + 1, len(found.names)), 2))
    yield _right_row(found, "right, two spoilt truths", spoilt)


def _right_row(
    found: Judged,
    what: str,
    pairs: Sequence[tuple[int, int]],
    low: float = APART,
    high: float = 1.01,
) -> dict[str, Cell]:
    row: dict[str, Cell] = {"what": what, "n": 0}
    for name in found.scores:
        picked, gaps = right(found, name, pairs)
        inside = (gaps >= low) & (gaps < high)
        row["n"] = int(inside.sum())
        known = picked[inside]
        silent = not len(known) or bool(np.isnan(known).any())
        row[name] = None if silent else 100 * float(known.mean())
    return row


def _choice_rows(lab: Lab, found: Judged) -> Iterator[dict[str, Cell]]:
    ious = 100 * found.ious[: found.ways]
    every = np.arange(ious.shape[1])

    def gain(values: Floats) -> tuple[float, float | None]:
        return clustered_mean(values - ious[0], found.image, lab.images, lab.resamples)

    row: dict[str, Cell] = {"what": "mean IoU gain of the mask chosen", "n": len(every)}
    for name, score in found.scores.items():
        chosen = ious[score[: found.ways].argmax(axis=0), every]
        row[name], row[f"{name}_se"] = gain(chosen)
    yield row
    ways = [*zip(found.names[: found.ways], ious, strict=True)]
    for name, values in (*ways, ("chosen by truth (oracle)", ious.max(axis=0))):
        mean, error = gain(values)
        yield {"what": f"mean IoU gain: {name}", "n": len(every), "value": mean, "value_se": error}


def _correlation_rows(found: Judged) -> Iterator[dict[str, Cell]]:
    ious, areas = found.ious[: found.ways], found.areas[: found.ways]
    kinds: dict[str, Callable[[Floats], float | None]] = {
        "rank correlation with IoU, one mask's ways": lambda score: _within(score, ious),
        "rank correlation with IoU, all": lambda score: _spearman(score, ious),
        "rank correlation with IoU, seeds alone": lambda score: _spearman(score[0], ious[0]),
        "rank correlation with area": lambda score: _spearman(score, areas),
    }
    for what, of in kinds.items():
        row: dict[str, Cell] = {"what": what, "n": ious.shape[1]}
        row |= {name: of(score[: found.ways]) for name, score in found.scores.items()}
        yield row


def _within(score: Floats, ious: Floats) -> float | None:
    columns = range(score.shape[1])
    found = [_spearman(score[:, column], ious[:, column]) for column in columns]
    known = [each for each in found if each is not None]
    return float(np.mean(known)) if known else None


def _spearman(first: Floats, second: Floats) -> float | None:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first.ravel(), second.ravel()).statistic)
