"""The loop's table: docs/results/loop.json and loop.md."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from PIL import Image

from g4seg_pl.callbacks.run_record import Json, environment, write_text_atomically
from g4seg_pl.evaluation.confusion import confusion_matrix, mean_iou
from g4seg_pl.segmentation.loop.plan import (
    CONFIG,
    ROWS,
    SCALES,
    Places,
    RowName,
    describe_labels,
    recipe,
)
from g4seg_pl.world.scenes import CLASS_NAMES
from g4seg_pl.world.settings import PROVENANCE

COMMAND = "python -m g4seg_pl.segmentation.loop"
REFERENCE = "seed"
ENOUGH = 2.0  # standard errors by which a gain must exceed 0


def label_miou(places: Places, row: RowName) -> float:
    """MIoU of a row's labels on the training scenes, in percent."""
    folder = places.labels(row)
    if folder is None:
        return 100.0
    truth = places.tree / "SegmentationClass"
    names = (places.tree / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    counts = np.zeros((len(CLASS_NAMES) + 1,) * 2, np.int64)
    for name in names:
        label, exact = (
            np.array(Image.open(root / f"{name}.png")) for root in (folder / "masks", truth)
        )
        counts += confusion_matrix(label, exact, len(CLASS_NAMES) + 1)
    return 100 * mean_iou(counts)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean over training seeds; None of a single one."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def table(places: Places, results: Sequence[dict[str, Any]]) -> list[dict[str, Json]]:
    """The rows of loop.json, in the order of the results.

    Args:
        places: of the loop.
        results: of all trainings, see ``training.train``; each row with the same seeds.

    Returns:
        name, ``miou`` and ``miou_se`` over the trainings, the single figures, ``val_miou``,
        ``label_miou`` of the labels themselves on the training scenes, and, where there are seeds
        to compare with, ``gain`` over them with its ``gain_se``, paired by training seed.
    """
    names: list[RowName] = list(dict.fromkeys(result["row"] for result in results))
    scores = {
        name: {each["seed"]: each["miou"] for each in results if each["row"] == name}
        for name in names
    }
    rows: list[dict[str, Json]] = []
    for name in names:
        values = list(scores[name].values())
        row: dict[str, Json] = {
            "name": name,
            "miou": mean(values),
            "miou_se": standard_error(values),
            "trainings": values,
            "val_miou": mean(each["val_miou"] for each in results if each["row"] == name),
            "label_miou": label_miou(places, name),
        }
        if REFERENCE in scores:
            gains = [value - scores[REFERENCE][seed] for seed, value in scores[name].items()]
            row |= {"gain": mean(gains), "gain_se": standard_error(gains)}
        rows.append(row)
    return rows


def write_report(
    places: Places, results: Sequence[dict[str, Any]], scale_name: str, out: Path
) -> str:
    """Write loop.json and loop.md; returns the latter's text."""
    rows = table(places, results)
    name, steps = recipe()
    made = environment()
    repeats = len(rows[0]["trainings"])
    content = {
        "rows": rows,
        "command": _command([row["name"] for row in rows], repeats, scale_name),
        "scenes": "embedded world, procedural; no VOC or COCO result",
        **asdict(places.scale),
        "repeats": repeats,
        "network": "SmallDeepLab from random weights",
        "config": f"configs/train/{CONFIG.name}",
        "selection": "the epoch with the best mIoU on validation scenes with exact masks",
        "test_scenes": f"test scenes 0 to {places.scale.test - 1}, with their mirror images",
        "miou_se": "standard error of the mean over training seeds",
        "gain_se": "the same of the difference from seed, paired by training seed",
        "recipe": name,
        "recipe_steps": repr(steps),
        "settings": PROVENANCE,
        "labels": {row["name"]: describe_labels(row["name"]) for row in rows},
        **{key: made[key] for key in ("created", "git_commit", "python", "versions")},
    }
    text = markdown(content)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / "loop.json", json.dumps(content, indent=2) + "\n")
    write_text_atomically(out / "loop.md", text)
    return text


def markdown(content: dict[str, Json]) -> str:
    """The fragment for docs/results.md."""
    lines = [
        f"A small DeepLab trained from random weights on {content['train']} scenes of the embedded "
        f"world ({content['steps']} steps, {content['repeats']} training seeds), scored on "
        f"{content['test_scenes']}; mIoU in percent ± standard error over training seeds. "
        f"The refiner is `{content['recipe']}` ({content['settings']}). "
        f"Made by `{content['command']}`.",
        "",
        "| trained on | mIoU of the labels | mIoU of the network | gain over seeds |",
        "|---|---|---|---|",
    ]
    lines += [_line(row) for row in content["rows"]]
    return "\n".join([*lines, "", verdict(content["rows"]), ""])


def verdict(rows: Sequence[dict[str, Json]]) -> str:
    """Whether g4seg's labels train a better network than the seeds do, in a sentence."""
    row = next((row for row in rows if row["name"] == "g4seg"), None)
    if row is None or row.get("gain_se") is None:
        return "Too little was trained to compare g4seg with the seeds."
    figures = f"{row['gain']:+.2f} ± {row['gain_se']:.2f}"
    if row["gain"] > ENOUGH * row["gain_se"]:
        return f"g4seg's labels train a better network than the seeds do: {figures}."
    base = next(row for row in rows if row["name"] == REFERENCE)
    change = row["label_miou"] - base["label_miou"]
    return (
        f"g4seg's labels do not train a better network than the seeds do by more than "
        f"{ENOUGH:g} standard errors: {figures}. On the training scenes the labels themselves "
        f"changed by {change:+.2f} mIoU."
    )


def _command(names: Sequence[RowName], repeats: int, scale_name: str) -> str:
    """What was asked for; the number of processes changes nothing."""
    words = [COMMAND, "--scale", scale_name]
    if tuple(names) != ROWS:
        words += ["--rows", *names]
    if repeats < SCALES[scale_name].repeats:
        words += ["--repeats", str(repeats)]
    return " ".join(words)


def _line(row: dict[str, Json]) -> str:
    gain = "–" if row["name"] == REFERENCE or "gain" not in row else _figure(row, "gain", "+.2f")
    network = _figure(row, "miou", ".2f")
    return f"| {row['name']} | {row['label_miou']:.2f} | {network} | {gain} |"


def _figure(row: dict[str, Json], name: str, form: str) -> str:
    error = row[f"{name}_se"]
    figure = f"{row[name]:{form}}"
    return figure if error is None else f"{figure} ± {error:.2f}"
