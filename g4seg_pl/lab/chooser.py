"""Tries settings of one way on validation scenes and keeps the best."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

from g4seg_pl.callbacks.run_record import Json
from g4seg_pl.core.background import Threshold
from g4seg_pl.evaluation.confusion import mean_overlap
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.scores import THRESHOLDS, Scores, pooled
from g4seg_pl.lab.sources import SceneSource
from g4seg_pl.lab.stages import Way
from g4seg_pl.types import ConfigurationError

LEAVES_PROBABILITIES = ("DenseCRF", "LabelFiles")


@dataclass(frozen=True)
class Candidate:
    """One setting of a way, scored on validation scenes.

    Attributes:
        stages: as written.
        background: the label threshold that scored best; None where labels need none.
        miou: in percent, at that threshold.
    """

    stages: list[Json]
    background: float | None
    miou: float


@dataclass
class Chooser:
    """Chooses for one kind of seeds.

    Attributes:
        lab: models and store.
        source: validation scenes.
        noise_seeds: of every setting tried.
        own_threshold: choose a label threshold for each way, as for the seed itself; otherwise
            all keep the seed's.
    """

    lab: Lab
    source: SceneSource
    noise_seeds: tuple[int, ...] = (0,)
    own_threshold: bool = True

    def __post_init__(self) -> None:
        """Refuse to look at anything but validation scenes."""
        if self.source.split != "val":
            message = f"split is {self.source.split!r}; settings are chosen on val alone"
            raise ConfigurationError(message)
        self.tried: dict[str, int] = {}

    def seed(self) -> Candidate:
        """The seed at its best threshold."""
        # The threshold of the label plays no part in the curve.
        plain = self.lab.runner().run(
            [Way("seed")], self.source, Threshold(0.5), self.noise_seeds[:1], curve=True
        )
        value, miou = best_threshold(plain["seed"])
        return Candidate([], value, miou)

    def try_all(self, settings: Sequence[list[Json]], threshold: float) -> list[Candidate]:
        """Score settings of a way, in one go so that they share what they have in common."""
        ways = [Way(str(index), self.lab.build(each)) for index, each in enumerate(settings)]
        found = self.lab.runner().run(
            ways, self.source, Threshold(threshold), self.noise_seeds, curve=True
        )
        return [self._candidate(stages, found[str(index)]) for index, stages in enumerate(settings)]

    def _candidate(self, stages: list[Json], runs: Sequence[Scores]) -> Candidate:
        fixed = stages and str(stages[-1]["class_path"]).endswith(LEAVES_PROBABILITIES)
        if fixed or not self.own_threshold:
            return Candidate(stages, None, 100 * mean_overlap(pooled(runs).overlaps))
        value, miou = best_threshold(runs)
        return Candidate(stages, value, miou)

    def way(
        self,
        stages: list[Json],
        axes: Mapping[str, Sequence[Json]],
        threshold: float,
        search: Literal["coordinate", "product"] = "coordinate",
        rounds: int = 1,
    ) -> tuple[Candidate, int]:
        """Return the best setting of a way and how many were tried.

        Args:
            stages: where the search begins.
            axes: values by ``<stage's number>.<argument>``; ``0.steps.0.init_args.timestep``
                reaches into nested steps.
            threshold: of the seeds.
            search: every combination, or one axis after the other with the rest held.
            rounds: how often one goes through all axes.
        """
        with self.lab.runner().keeping():  # what settings have in common is computed once
            if search == "product":
                settings = [
                    with_values(stages, dict(zip(axes, values, strict=True)))
                    for values in product(*axes.values())
                ]
                found = self.try_all(settings, threshold)
                return max(found, key=lambda each: each.miou), len(found)
            best = self.try_all([stages], threshold)[0]
            tried = {json.dumps(stages, sort_keys=True)}
            for _ in range(rounds):
                for axis, values in axes.items():
                    settings = [with_values(best.stages, {axis: value}) for value in values]
                    tried |= {json.dumps(each, sort_keys=True) for each in settings}
                    found = self.try_all(settings, threshold)
                    best = max([best, *found], key=lambda each: each.miou)
            return best, len(tried)


def best_threshold(runs: Sequence[Scores]) -> tuple[float, float]:
    """Return the threshold with the best mIoU and that mIoU in percent."""
    curve = pooled(runs).curve.sum(axis=0)
    scores = [mean_overlap(each) for each in curve]
    index = int(np.argmax(scores))
    return THRESHOLDS[index], 100 * scores[index]


def with_values(stages: Sequence[Json], values: Mapping[str, Json]) -> list[Json]:
    """Return stages as written, with other values of some arguments.

    Args:
        stages: ``class_path`` and ``init_args`` of each.
        values: by ``<stage's number>.<argument>``; stage -1 is the last.

    Raises:
        ConfigurationError: a name leads nowhere.
    """
    changed = copy.deepcopy(list(stages))
    for name, value in values.items():
        number, _, path = name.partition(".")
        index = len(changed) - 1 if number == "-1" else int(number) if number.isdigit() else -1
        if not 0 <= index < len(changed) or not path:
            message = f"axis {name!r}: give <number of the stage>.<argument>, stages from 0"
            raise ConfigurationError(message)
        place: Any = changed[index].setdefault("init_args", {})
        *way, last = path.split(".")
        for part in way:
            place = place[int(part)] if part.isdigit() else place[part]
        place[last] = value
    return changed
