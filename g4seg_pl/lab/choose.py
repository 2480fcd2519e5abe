"""Settings are chosen here, on validation scenes only, and written to chosen.json."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from g4seg_pl.callbacks.run_record import Json, describe, write_text_atomically
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab.choose_features import choose_features
from g4seg_pl.lab.chooser import Chooser
from g4seg_pl.lab.laboratory import REPOSITORY, Lab
from g4seg_pl.lab.sources import SeedKind
from g4seg_pl.types import ConfigurationError

GRID = REPOSITORY / "configs" / "paper" / "choose.yaml"


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
    noise, own = tuple(plan.get("noise_seeds", [0])), bool(plan.get("own_threshold", True))
    chosen: dict[str, Any] = {
        "protocol": {
            "split": f"validation scenes 0 to {count - 1}",
            "noise seeds": list(noise),
            "threshold": "own" if own else "the seed's",
            "generator": lab.models.generator_identity,
        },
        "same_as": plan.get("same_as", {}),
        "kinds": {},
    }
    if lab.chosen_file.is_file():
        before = json.loads(lab.chosen_file.read_text(encoding="utf-8"))
        chosen |= {name: before[name] for name in ("features", "kinds") if name in before}

    def chooser_of(kind: SeedKind, chooses: Lab = lab) -> Chooser:
        return Chooser(chooses, chooses.source(kind, "val", count, 0), noise, own)

    if "features" in plan and (not only or "features" in only):
        deciding = plan["features"]
        # Whatever F was before, what this finds is kept under the same name and found again. The
        # file stays as it is meanwhile: without F it would be read as one of the autoencoder's.
        plain = replace(lab)
        plain.features = VAEFeatures()
        chosen["features"] = choose_features(chooser_of(deciding["kind"], plain), deciding)
        _write(lab.chosen_file, chosen)
        lab.forget_chosen()
    elif "features" not in chosen:
        chosen["features"] = describe(lab.features)
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
