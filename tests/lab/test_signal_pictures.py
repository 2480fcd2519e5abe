"""Figures of the signals: every one drawn, and what they show is what the steps do."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.signal_pictures import signal_pictures
from g4seg_pl.lab.stages import at_threshold
from g4seg_pl.report import pictures

SIDE, GAP, HEAD = 160, 4, 20


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return signal_pictures(lab, tmp_path_factory.mktemp("signals"), count=1)


def panel(path: Path, column: int) -> Image.Image:
    left = column * (SIDE + GAP)
    with Image.open(path) as sheet:
        return sheet.crop((left, HEAD, left + SIDE, HEAD + SIDE))


def test_every_signal_has_its_figure_of_one_scene(folder: Path) -> None:
    columns = {
        "grounding": 5,
        "affinity": 5,
        "gradient": 5,
        "correspondence": 6,
        "likelihood": 4,
    }
    assert {path.stem for path in folder.iterdir()} == set(columns)
    for name, count in columns.items():
        with Image.open(folder / f"{name}.png") as sheet:
            size = sheet.size
        assert size == (count * (SIDE + GAP) - GAP, HEAD + SIDE)


def test_columns_are_the_scene_and_what_the_step_makes_of_it(lab: Lab, folder: Path) -> None:
    source = lab.source(lab.kinds[0])
    sample = next(s for s in source.samples(source.ids) if len(s.class_names) == 1)
    assert sample.truth is not None
    truth = (sample.truth == sample.seed.class_ids[0]).float().numpy()
    threshold = lab.background(lab.kinds[0]).value
    step = at_threshold(lab.way(lab.kinds[0], "grounding").stages[0], threshold)
    mixed = step(sample.seed.scores, lab.models.refiner().context([sample]))
    values = mixed[0].numpy()
    centred = np.interp(values, [0, threshold, 1], [0, 0.5, 1]).astype(np.float32)
    for column, map_ in ((1, truth), (4, centred)):
        shown = np.asarray(panel(folder / "grounding.png", column), np.int16)
        expected = np.asarray(pictures.fit(pictures.heat(map_), (SIDE, SIDE)), np.int16)
        assert np.abs(shown - expected).max() <= 3
