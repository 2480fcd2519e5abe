"""F of Eq. 8 is chosen first: in which feature space generated and original image are matched."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from g4seg_pl.callbacks.run_record import Json
from g4seg_pl.lab.chooser import Chooser, with_values
from g4seg_pl.lab.written import object_text

WITH_FEATURES = "g4seg_pl.lab.controls.WithFeatures"


def choose_features(chooser: Chooser, plan: Mapping[str, Any]) -> dict[str, Json]:
    """Return the feature space in which the paper's update gains most, and what was tried.

    Args:
        chooser: of the kind of seeds that decides.
        plan: ``stages`` of the update, ``axes`` of which every combination is tried in every
            space, and ``candidates``, extractors as YAML writes them.

    Returns:
        ``class_path`` and ``init_args`` of the best, and ``tried``: of each candidate the best
        gain on validation scenes and the values it was reached with.
    """
    seed = chooser.seed()
    assert seed.background is not None
    axes: Mapping[str, Sequence[Json]] = plan["axes"]
    combinations = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    tried: list[dict[str, Any]] = []
    for candidate in plan["candidates"]:
        settings = [
            [_wrapped(candidate, with_values(plan["stages"], values))] for values in combinations
        ]
        found = chooser.try_all(settings, seed.background)
        best = max(range(len(found)), key=lambda index: found[index].miou)
        gain = round(found[best].miou - seed.miou, 3)
        tried.append({"features": candidate, "val_gain": gain, "at": combinations[best]})
        if not chooser.lab.quiet:
            print(f"{object_text(candidate)}: {gain:+.2f}", flush=True)
    winner = max(tried, key=lambda each: float(each["val_gain"]))["features"]
    return {**winner, "tried": tried}


def features_text(chosen: Mapping[str, Any]) -> str:
    """The tried spaces as a table, the chosen one marked."""
    lines = [
        "### Where images are matched: feature spaces tried for the paper's update",
        "",
        "On validation scenes, each at its best setting of a small grid; the first is what all "
        "matching above uses.",
        "",
        "| F of Eq. 8 | validation gain | at |",
        "|---|---|---|",
    ]
    for each in sorted(chosen["tried"], key=lambda each: -float(each["val_gain"])):
        at = ", ".join(f"{axis.rpartition('.')[2]} {value}" for axis, value in each["at"].items())
        lines.append(f"| {object_text(each['features'])} | {each['val_gain']:+.2f} | {at} |")
    return "\n".join(lines) + "\n"


def _wrapped(features: Json, steps: Sequence[Json]) -> Json:
    return {"class_path": WITH_FEATURES, "init_args": {"features": features, "steps": list(steps)}}
