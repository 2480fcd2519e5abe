"""The demo's files say what its table says."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from g4seg_pl.world.demo import demo
from g4seg_pl.world.scenes import CLASS_NAMES, FIRST_SEED, draw_scene

COUNT = 8
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert demo(folder, images=COUNT, scene_seed=41) == 0
    return folder


def by_histogram(folder: Path) -> float:
    """mIoU in percent of a folder of label files, by a plain histogram."""
    classes = len(CLASS_NAMES) + 1
    counts = np.zeros((classes, classes))
    for file in sorted(folder.glob("*.png")):
        truth = draw_scene(int(file.stem.removeprefix("scene_"))).mask.astype(int)
        found = np.asarray(Image.open(file)).astype(int)
        counts += np.bincount((truth * classes + found).ravel(), minlength=classes**2).reshape(
            classes, classes
        )
    hit = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hit
    return float(100 * (hit[union > 0] / union[union > 0]).mean())


@pytest.mark.parametrize(
    ("folder", "row"), [("seeds", "seed"), ("masks", "g4seg-best"), ("masks_paper", "g4seg")]
)
def test_rows_are_the_scores_of_the_files(out: Path, folder: str, row: str) -> None:
    metrics = json.loads((out / "metrics.json").read_text())
    rows = {each["name"]: each for each in metrics["rows"]}
    assert rows[row]["miou"] == pytest.approx(by_histogram(out / folder), abs=1e-6)
    assert rows[row]["gain"] == pytest.approx(rows[row]["miou"] - rows["seed"]["miou"], abs=1e-6)


def test_table_has_its_controls_and_says_where_it_stands(out: Path) -> None:
    metrics = json.loads((out / "metrics.json").read_text())
    names = [row["name"] for row in metrics["rows"]]
    assert names[:3] == ["seed", "g4seg", "g4seg-best"]
    assert names[3:] == ["no-injection", "feature-nn", "blur", "guided+colour-affinity", "word"]
    assert metrics["n_images"] == COUNT
    assert metrics["split"] == "test scenes 41 to 48"
    assert metrics["background_rule"].keys() == set(names)


def test_scenes_are_the_ones_asked_for_and_shown(out: Path) -> None:
    expected = {f"scene_{FIRST_SEED['test'] + 41 + index:08d}.png" for index in range(COUNT)}
    assert {file.name for file in (out / "masks").iterdir()} == expected
    with Image.open(out / "pictures.png") as sheet:
        assert sheet.width > 7 * 64
        assert sheet.height > COUNT * 64
