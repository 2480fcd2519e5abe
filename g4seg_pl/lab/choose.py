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

    F and each kind have, as ``protocol``, what they were chosen on: a part may be chosen anew
    while others stay.

    Args:
        lab: models and store.
        grid: YAML with ``scenes``, ``kinds``, ``same_as``, ``features`` and ``ways``.
        kinds: instead of the grid's.
        scenes: instead of the grid's.
        only: ways to choose anew, ``features`` among them; the others stay as the file has them.

    Raises:
        ConfigurationError: what would stay was chosen for another generator, or beside ways of
            its own kind on other scenes.
    """
    plan = yaml.safe_load(grid.read_text(encoding="utf-8"))
    count = scenes or int(plan["scenes"])
    noise, own = tuple(plan.get("noise_seeds", [0])), bool(plan.get("own_threshold", True))
    protocol: Json = {
        "split": f"validation scenes 0 to {count - 1}",
        "noise seeds": list(noise),
        "threshold": "own" if own else "the seed's",
        "generator": lab.models.generator_identity,
    }
    wanted = list(kinds or plan["kinds"])
    anew = "features" in plan and (not only or "features" in only)
    chosen = {"protocol": protocol, "same_as": plan.get("same_as", {}), "kinds": {}}
    chosen |= _kept(lab.chosen_file, protocol, wanted, anew, only)

    def chooser_of(kind: SeedKind, chooses: Lab = lab) -> Chooser:
        return Chooser(chooses, chooses.source(kind, "val", count, 0), noise, own)

    if anew:
        deciding = plan["features"]
        # Whatever F was before, what this finds is kept under the same name and found again. The
        # file stays as it is meanwhile: without F it would be read as one of the autoencoder's.
        plain = replace(lab)
        plain.features = VAEFeatures()
        found = choose_features(chooser_of(deciding["kind"], plain), deciding)
        chosen["features"] = {**found, "protocol": protocol}
        _write(lab.chosen_file, chosen)
        lab.forget_chosen()
    elif "features" not in chosen:
        chosen["features"] = {**describe(lab.features), "protocol": protocol}
    for kind in wanted:
        chooser = chooser_of(kind)
        earlier = chosen["kinds"].get(kind, {}).get("ways", {}) if only else {}
        found = _choose_kind(chooser, plan["ways"], earlier, only)
        chosen["kinds"][kind] = {"protocol": protocol, **found}
        _write(lab.chosen_file, chosen)
    lab.forget_chosen()
    return chosen


def _kept(
    path: Path, protocol: Json, wanted: Sequence[str], anew: bool, only: Sequence[str] | None
) -> dict[str, Any]:
    """Features and kinds of the file, each with what it was chosen on.

    Args:
        path: the file; there may be none.
        protocol: of what is chosen now.
        wanted: the kinds to be chosen now; of another generator they are left out.
        anew: whether features will be chosen too.
        only: ways to be chosen now; all if None.

    Raises:
        ConfigurationError: what will not be chosen now is of another generator, or other ways of
            a kind were chosen on something else.
    """
    if not path.is_file():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    kinds: dict[str, Any] = before.get("kinds", {})
    parts = {f"{kind} seeds": found for kind, found in kinds.items()}
    if "features" in before:
        parts["F of Eq. 8"] = before["features"]
    for part in parts.values():
        # A file from before parts had their own: what it says there holds of all.
        part.setdefault("protocol", before["protocol"])
    generator = protocol["generator"]
    other = {name for name, part in parts.items() if part["protocol"]["generator"] != generator}
    chosen_now = {f"{kind} seeds" for kind in wanted} | ({"F of Eq. 8"} if anew else set())
    if staying := sorted(other - chosen_now):
        message = (
            f"{path}: {', '.join(staying)} would stay as chosen for another generator; choose all "
            "kinds and features at once, or write elsewhere by --results"
        )
        raise ConfigurationError(message)
    if only:
        _refuse_a_mixture(path, kinds, protocol, wanted, only)
    kinds = {kind: found for kind, found in kinds.items() if f"{kind} seeds" not in other}
    features = {"features": before["features"]} if "features" in before else {}
    return {**features, "kinds": kinds}


def _refuse_a_mixture(
    path: Path,
    kinds: Mapping[str, Any],
    protocol: Json,
    wanted: Sequence[str],
    only: Sequence[str],
) -> None:
    """Raise if ways that stay would stand beside those chosen now on something else."""
    for kind in wanted:
        found = kinds.get(kind, {"ways": {}, "protocol": protocol})
        if set(found["ways"]) - set(only) and found["protocol"] != protocol:
            differ = {n: each for n, each in found["protocol"].items() if each != protocol.get(n)}
            message = (
                f"{path}: ways of {kind} seeds that stay were chosen on {differ}; choose these "
                "seeds without --only, or on the same"
            )
            raise ConfigurationError(message)


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
