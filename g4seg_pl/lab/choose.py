"""Settings are chosen here, on validation scenes only, and written to chosen.json."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from g4seg_pl.callbacks.run_record import Json, write_text_atomically
from g4seg_pl.core.background import Threshold
from g4seg_pl.evaluation.confusion import mean_iou
from g4seg_pl.lab.laboratory import REPOSITORY, Lab
from g4seg_pl.lab.scores import THRESHOLDS, Scores, pooled
from g4seg_pl.lab.sources import SceneSource, SeedKind
from g4seg_pl.lab.stages import Way
from g4seg_pl.types import ConfigurationError

GRID = REPOSITORY / "configs" / "paper" / "choose.yaml"
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
            return Candidate(stages, None, 100 * mean_iou(pooled(runs).counts))
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
    scores = [mean_iou(each) for each in curve]
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


def choose(
    lab: Lab,
    grid: Path = GRID,
    kinds: Sequence[SeedKind] | None = None,
    scenes: int | None = None,
    only: Sequence[str] | None = None,
) -> Json:
    """Choose thresholds and settings, write them to the lab's file and return them.

    Args:
        lab: models and store.
        grid: YAML with ``scenes``, ``kinds``, ``same_as``, ``features`` and ``ways``.
        kinds: instead of the grid's.
        scenes: instead of the grid's.
        only: ways to choose anew, ``features`` among them; the others stay as the file has them.
    """
    plan = yaml.safe_load(grid.read_text(encoding="utf-8"))
    count = scenes or int(plan["scenes"])
    chosen: dict[str, Any] = {
        "protocol": {
            "split": f"validation scenes 0 to {count - 1}",
            "noise seeds": plan.get("noise_seeds", [0]),
            "threshold": "own" if plan.get("own_threshold", True) else "the seed's",
            "generator": lab.models.generator_identity,
        },
        "same_as": plan.get("same_as", {}),
        "kinds": {},
    }
    if lab.chosen_file.is_file():
        before = json.loads(lab.chosen_file.read_text(encoding="utf-8"))
        chosen |= {name: before[name] for name in ("features", "kinds") if name in before}
    noise, own = tuple(plan.get("noise_seeds", [0])), bool(plan.get("own_threshold", True))

    def chooser_of(kind: SeedKind) -> Chooser:
        return Chooser(lab, lab.source(kind, "val", count, 0), noise, own)

    if "features" in plan and (not only or "features" in only):
        from g4seg_pl.lab.choose_features import choose_features  # it is made of this

        deciding = plan["features"]
        chosen["features"] = choose_features(chooser_of(deciding["kind"]), deciding)
        _write(lab.chosen_file, chosen)
        lab.forget_chosen()
    for kind in kinds or plan["kinds"]:
        chooser = chooser_of(kind)
        earlier = chosen["kinds"].get(kind, {}).get("ways", {}) if only else {}
        chosen["kinds"][kind] = _choose_kind(chooser, plan["ways"], earlier, only)
        _write(lab.chosen_file, chosen)
    lab.forget_chosen()
    return chosen


def _choose_kind(
    chooser: Chooser,
    ways: Mapping[str, Any],
    earlier: Mapping[str, Json],
    only: Sequence[str] | None,
) -> Json:
    seed = chooser.seed()
    assert seed.background is not None
    threshold = seed.background
    found = dict(earlier)
    for name, plan in ways.items():
        if only and name not in only and name in found:
            continue
        if "of" in plan:
            found[name] = _best_of(name, plan["of"], found)
            continue
        axes, start = plan.get("axes") or {}, _start(name, plan, found)
        how = plan.get("search", "coordinate")
        best, tried = chooser.way(start, axes, threshold, how, int(plan.get("rounds", 1)))
        found[name] = {
            "stages": best.stages,
            "background": best.background,
            "val_miou": round(best.miou, 3),
            "val_gain": round(best.miou - seed.miou, 3),
            "tried": tried,
        }
        if not chooser.lab.quiet:
            print(f"{chooser.source.kind}: {name}: {best.miou - seed.miou:+.2f}", flush=True)
    return {"seed": {"background": threshold, "val_miou": round(seed.miou, 3)}, "ways": found}


def _best_of(name: str, others: Sequence[str], found: Mapping[str, Any]) -> Json:
    """The way, of those already chosen, that gained most on validation scenes."""
    missing = [other for other in others if other not in found]
    if missing:
        message = f"way {name!r} is one of {missing[0]!r}, which must stand before it in the grid"
        raise ConfigurationError(message)
    return copy.deepcopy(max((found[other] for other in others), key=lambda way: way["val_miou"]))


def _start(name: str, plan: Mapping[str, Any], found: Mapping[str, Any]) -> list[Json]:
    if "stages" in plan:
        return list(plan["stages"])
    parts = str(plan.get("base", name)).split("+")
    missing = [part for part in parts if part not in found]
    if missing:
        message = f"way {name!r} begins with {missing[0]!r}, which must stand before it in the grid"
        raise ConfigurationError(message)
    return [stage for part in parts for stage in copy.deepcopy(found[part]["stages"])]


def _write(path: Path, chosen: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(chosen, indent=1, ensure_ascii=False) + "\n")
