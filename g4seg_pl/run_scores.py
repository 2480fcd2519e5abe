"""The scores of a `g4seg test`: seed, refined, and refined as callbacks changed it."""

from dataclasses import dataclass, field
from typing import Any

import torch

from g4seg_pl.core.background import BackgroundRule, compose_label
from g4seg_pl.evaluation.paired import PairedScores
from g4seg_pl.types import ConfigurationError, FailedSample, RefinedMask, Sample

CHANGED = "refined+crf"
"""The row of masks that a callback changed: the dense CRF is the one that does."""


@dataclass
class RunScores:
    """Scores of one test run, filled image by image.

    Attributes:
        num_classes: number of labels, background included.
        background: scores the background of seeds, as of refined masks.
        refined: seeds and refined masks.
        changed: seeds and refined masks as callbacks changed them; empty if none does.
        failed: images that could not be scored, with the error of each.
    """

    num_classes: int
    background: BackgroundRule
    refined: PairedScores = field(init=False)
    changed: PairedScores = field(init=False)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        self.refined = PairedScores(self.num_classes)
        self.changed = PairedScores(self.num_classes)

    def add(
        self,
        item: Sample | FailedSample,
        refined: RefinedMask | FailedSample,
        final: RefinedMask | FailedSample,
    ) -> None:
        """Score one image, or note why it cannot be.

        Args:
            item: as read.
            refined: what the model made of it.
            final: the same after callbacks; the same object if none changed it.
        """
        outcome = next((each for each in (refined, final) if isinstance(each, FailedSample)), None)
        if outcome is not None:
            self.failed[outcome.image_id] = outcome.error
        elif isinstance(item, Sample) and item.truth is None:
            self.failed[item.image_id] = "no ground truth: test needs a split with label files"
        elif isinstance(item, Sample):
            self._count(self.refined, item, refined)
            if final is not refined:
                self._count(self.changed, item, final)

    def gather(self, processes: int) -> None:
        """Take over what the other processes scored; all of them must call this."""
        if processes == 1:
            return
        gathered: list[Any] = [None] * processes
        ours = (self.refined, self.changed, self.failed)
        torch.distributed.all_gather_object(gathered, ours)
        for refined, changed, failed in gathered:
            self.refined.update([refined])
            self.changed.update([changed])
            self.failed |= failed

    def summary(self) -> dict[str, float]:
        """All scores by name, in percent, as ``PairedScores`` names them.

        Those of changed masks begin with their row's name: ``refined+crf_miou``,
        ``refined+crf_gain`` over the seed.

        Raises:
            ConfigurationError: if no image could be scored.
        """
        if not len(self.refined):
            msg = f"test: no image could be scored, {len(self.failed)} failed{self._first_failure}"
            raise ConfigurationError(msg)
        scores = self.refined.summary() | {"n_failed": float(len(self.failed))}
        if len(self.changed):
            for name, value in self.changed.summary().items():
                if name.startswith(("refined", "gain")):
                    scores[f"{CHANGED}_{name.removeprefix('refined_')}"] = value
        return scores

    @property
    def _first_failure(self) -> str:
        """One example, for the message."""
        return "".join(f"; {name}: {error}" for name, error in list(self.failed.items())[:1])

    def _count(self, scores: PairedScores, sample: Sample, mask: Any) -> None:
        """Count the label maps of one image."""
        if sample.truth is None:
            return
        seed = compose_label(sample.seed.scores, sample.seed.class_ids, self.background)
        scores.add(sample.image_id, seed.numpy(), mask.label.numpy(), sample.truth.numpy())


def score_rows(scores: dict[str, float]) -> list[dict[str, float | str]]:
    """A table of the scores of a test: one row for seed, refined and, if any, refined+crf.

    Args:
        scores: as logged, names without ``test/``.

    Returns:
        rows of ``name``, ``miou``, ``miou_se`` and, but for the seed, ``gain`` over it and
        ``gain_se``, in percent.
    """
    gains = {"refined": "gain", CHANGED: f"{CHANGED}_gain"}
    rows: list[dict[str, float | str]] = []
    for name in ("seed", "refined", CHANGED):
        if f"{name}_miou" not in scores:
            continue
        row: dict[str, float | str] = {"name": name, "miou": scores[f"{name}_miou"]}
        row["miou_se"] = scores[f"{name}_miou_se"]
        if name in gains:
            row |= {"gain": scores[gains[name]], "gain_se": scores[f"{gains[name]}_se"]}
        rows.append(row)
    return rows
