"""docs/results.md from docs/results/*.json: no figure is written by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from g4seg_pl.callbacks.run_record import write_text_atomically
from g4seg_pl.lab.choose_features import features_text
from g4seg_pl.lab.summary import short_text
from g4seg_pl.lab.table import read_table
from g4seg_pl.lab.written import object_text

# What a reader asks first comes first; the long table of settings stands behind all others.
ORDER = (
    "refiners",
    "makers",
    "claim",
    "modules",
    "sensitivity",
    "signals",
    "controls",
    "groups",
    "likelihood",
    "words",
    "open_vocabulary",
    "decoders",
    "costs",
)
HEAD = """# Results

Every figure below was measured in the embedded world (procedural scenes and the small models in
this repository) and written by `make lab`; nothing here is a result of Stable Diffusion on VOC,
Context or COCO. Settings were chosen on validation scenes, figures are of test scenes. The paper's
own figures, where they stand, are marked (P). Seconds depend on the machine that made a table:
compare them within one, and across tables in that of costs. The table of networks is `make loop`'s.

A *way* is a refiner or a chain of them: `a+b` runs b on what a leaves. *Seeds* say where the coarse
masks come from: Grad-CAM of the small CLIP, the generator's cross-attention, exact masks spoilt on
purpose. F is the feature space that the paper's update compares images in.
"""


def write_report(results: Path) -> Path:
    """Write ``results.md`` beside the folder of tables and return its path.

    Args:
        results: the folder of ``<table>.json``; ``docs/results`` in the repository. ``loop.md``
            and ``failures.png``, if they lie there, are shown behind the tables.
    """
    parts = [HEAD]
    refiners = results / "refiners.json"
    if refiners.is_file():
        parts.append(short_text(json.loads(refiners.read_text(encoding="utf-8"))["rows"]))
    tables = {path.stem: path for path in sorted(results.glob("*.json")) if _is_table(path)}
    names = [*(n for n in ORDER if n in tables), *(n for n in tables if n not in ORDER)]
    parts += [read_table(tables[name]).markdown() for name in names]
    loop = results / "loop.md"
    if loop.is_file():
        parts.append(f"### Networks trained on the result\n\n{loop.read_text(encoding='utf-8')}")
    if (results / "failures.png").is_file():
        parts.append("### Failures\n\n![scenes that lost most](results/failures.png)\n")
    chosen = results / "chosen.json"
    if chosen.is_file():
        settings = json.loads(chosen.read_text(encoding="utf-8"))
        if "tried" in settings.get("features", {}):
            parts.append(features_text(settings["features"]))
        parts.append(chosen_text(settings))
    target = results.with_suffix(".md")
    write_text_atomically(target, "\n".join(parts))
    return target


def chosen_text(chosen: Mapping[str, Any]) -> str:
    """The chosen settings as a table: gain on validation scenes and how many were tried."""
    lines = [
        "### Chosen settings",
        "",
        _chosen_on(chosen),
        "",
        "| seeds | way | threshold | validation gain | tried | settings |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in chosen["kinds"].items():
        seed = found["seed"]
        lines.append(
            f"| {kind} | seed | {seed['background']:g} | | | mIoU {seed['val_miou']:.2f} |"
        )
        for name, way in found["ways"].items():
            value = way["background"]
            threshold = "" if value is None else f"{value:g}"
            told = "; ".join(object_text(stage) for stage in way["stages"])
            gain, tried = f"{way['val_gain']:+.2f}", way["tried"]
            lines.append(f"| {kind} | {name} | {threshold} | {gain} | {tried} | {told} |")
    return "\n".join(lines) + "\n"


def _chosen_on(chosen: Mapping[str, Any]) -> str:
    """What settings were chosen on, of each kind of seeds where they differ."""
    told: dict[str, list[str]] = {}
    for kind, found in chosen["kinds"].items():
        protocol = found.get("protocol", chosen["protocol"])
        text = f"{protocol['split']}; label thresholds: {protocol['threshold']}"
        told.setdefault(text, []).append(kind)
    if len(told) == 1:
        return f"On {next(iter(told))}."
    return " ".join(f"{', '.join(kinds)}: on {text}." for text, kinds in told.items())


def _is_table(path: Path) -> bool:
    # The loop writes rows too, and its own Markdown beside them.
    return {"rows", "notes"} <= set(json.loads(path.read_text(encoding="utf-8")))
