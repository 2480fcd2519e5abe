"""Picture grids: scenes that a way improved or spoilt most."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from g4seg_pl.core.background import BackgroundRule
from g4seg_pl.evaluation.confusion import divide
from g4seg_pl.lab.chain import ChainRunner, labels_of, make_batch
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.scores import Scores
from g4seg_pl.lab.stages import Masks, Way
from g4seg_pl.lab.tables.refinement import named
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.report import pictures
from g4seg_pl.types import Sample


def most_changed(before: Scores, after: Scores, count: int, *, worst: bool) -> list[str]:
    """Return the images whose own mIoU fell, or rose, most."""
    own = [divide(each.overlaps[:, 0], each.overlaps[:, 1]) for each in (before, after)]
    change = np.nanmean(own[1], axis=1) - np.nanmean(own[0], axis=1)
    order = np.argsort(change if worst else -change)[:count]
    return [before.ids[index] for index in order]


def sheet(
    refiner: G4SegRefiner, samples: Sequence[Sample], ways: Sequence[Way], rule: BackgroundRule
) -> Image.Image:
    """Image, truth, seed and every way's labels, a row a scene."""
    with torch.no_grad():
        batch = make_batch(refiner, samples)
        chains = ChainRunner(batch, Masks(tuple(s.seed.scores for s in samples), rule))
        labels = [labels_of(chains.run(way).masks, samples) for way in (Way("seed"), *ways)]
    rows = []
    for index, sample in enumerate(samples):
        image = sample.image.permute(1, 2, 0).numpy()
        row = [Image.fromarray(image)]
        if sample.truth is not None:
            row.append(pictures.overlay(image, sample.truth.numpy()))
        rows.append(row + [pictures.overlay(image, each[index].numpy()) for each in labels])
    titles = ("image", "truth", "seed", *(way.name for way in ways))
    return pictures.grid(rows, titles)


def failures(lab: Lab, folder: Path, count: int = 8) -> Path:
    """Write failures.png: the scenes that the best recipe, or else g4seg, spoilt most."""
    kind = lab.kinds[0]
    ways = named(lab, kind, ("best", "g4seg", "feature-nn", "dcrf"))
    found = lab.scores(kind, ways)
    ids = most_changed(found["seed"][0], found[ways[0].name][0], count, worst=True)
    source = lab.source(kind)
    by_id = {
        sample.image_id: sample
        for start in range(0, len(source.ids), 16)
        if set(source.ids[start : start + 16]) & set(ids)
        for sample in source.samples(source.ids[start : start + 16])
    }
    made = sheet(lab.refiner(), [by_id[name] for name in ids], ways, lab.background(kind))
    folder.mkdir(parents=True, exist_ok=True)
    made.save(folder / "failures.png")
    return folder / "failures.png"
