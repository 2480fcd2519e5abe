"""The loop in miniature: every row trained, labels as the demo makes them, nothing done twice."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from segmentation.trees import label_file

from g4seg_pl.segmentation.loop import labels, plan, report, training
from g4seg_pl.segmentation.loop.__main__ import main
from g4seg_pl.segmentation.loop.plan import ROWS, SCALES, Places, RowName, Training
from g4seg_pl.types import ConfigurationError
from g4seg_pl.world.demo import refine_all
from g4seg_pl.world.load import load_refiner, load_seed_maker, scenes, with_seeds
from g4seg_pl.world.scenes import FIRST_SEED, draw_scene
from g4seg_pl.world.settings import BACKGROUNDS, RECIPES

SMALL = SCALES["small"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("loop"), SMALL)


@pytest.fixture(scope="module")
def finished(places: Places) -> dict[str, Any]:
    """What the miniature wrote."""
    pytest.importorskip("pydensecrf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(places.root)
        assert main(["--scale", "small", "--out", str(places.root)]) == 0
    content: dict[str, Any] = json.loads((places.root / "results" / "loop.json").read_text())
    return content


def test_every_row_is_trained_and_reported(places: Places, finished: dict[str, Any]) -> None:
    assert [row["name"] for row in finished["rows"]] == list(ROWS)
    for row in finished["rows"]:
        done = [training.load_result(job) for job in jobs(places, row["name"])]
        values = [result["miou"] for result in done if result is not None]
        assert len(values) == SMALL.repeats == len(row["trainings"])
        assert row["miou"] == pytest.approx(np.mean(values))
        assert row["miou_se"] == pytest.approx(abs(values[0] - values[1]) / 2)
        assert all(result["steps"] == SMALL.steps for result in done if result is not None)
    assert finished["recipe"] == next(n for n in ("g4seg-best", "g4seg") if n in RECIPES)
    assert finished["recipe_steps"] == repr(RECIPES[finished["recipe"]])
    assert finished["command"] == f"{report.COMMAND} --scale small"
    assert (finished["test"], finished["repeats"]) == (SMALL.test, SMALL.repeats)
    text = (places.root / "results" / "loop.md").read_text()
    assert all(f"| {name} |" in text for name in ROWS)


def jobs(places: Places, row: RowName) -> list[training.Job]:
    """The trainings of a row."""
    return [training.Job(places, Training(row, seed)) for seed in range(SMALL.repeats)]


def test_labels_are_the_demos_on_unseen_training_scenes(
    places: Places, finished: dict[str, Any]
) -> None:
    from g4seg_pl.core.background import compose_label

    samples = with_seeds(scenes("train", SMALL.train, SMALL.first), load_seed_maker())
    refiner = load_refiner(0).with_steps(RECIPES[finished["recipe"]])
    refined = refine_all(refiner, samples)
    for sample, soft in zip(samples, refined, strict=True):
        number = int(sample.image_id.removeprefix("scene_"))
        assert number >= FIRST_SEED["train"] + SMALL.first
        expected = {"seed": ("seed", sample.seed.scores), "g4seg": (finished["recipe"], soft)}
        for row, (name, scores) in expected.items():
            label = compose_label(scores, sample.seed.class_ids, BACKGROUNDS[name]).numpy()
            folder = places.labels(row)  # type: ignore[arg-type]
            assert folder is not None
            assert np.array_equal(label_file(folder / "masks" / f"{sample.image_id}.png"), label)
        truth = label_file(places.tree / "SegmentationClass" / f"{sample.image_id}.png")
        assert np.array_equal(truth, draw_scene(number).mask)


def test_what_is_finished_is_not_done_again(
    places: Places, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del finished
    before = {path: path.stat().st_mtime_ns for path in places.root.rglob("*") if path.is_file()}

    def refuse(*_: Any) -> None:
        pytest.fail("finished work was done again")

    monkeypatch.setattr(training, "run", refuse)
    monkeypatch.setattr(labels, "with_seeds", refuse)
    monkeypatch.chdir(places.root)
    assert main(["--scale", "small", "--out", str(places.root)]) == 0
    changed = {path.name for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {"loop.json", "loop.md"}


def test_a_part_says_what_it_is(
    places: Places, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del finished
    monkeypatch.chdir(places.root)
    part = ["--rows", "truth", "seed", "--repeats", "1", "--results", str(places.root / "part")]
    assert main(["--scale", "small", "--out", str(places.root), *part]) == 0
    content = json.loads((places.root / "part" / "loop.json").read_text())
    assert content["command"].endswith("--scale small --rows seed truth --repeats 1")
    assert [row["miou_se"] for row in content["rows"]] == [None, None]
    assert content["repeats"] == 1
    assert "Too little" in (places.root / "part" / "loop.md").read_text()


def test_only_what_was_lost_is_made_again(places: Places, finished: dict[str, Any]) -> None:
    del finished
    folder = places.labels("seed+crf")
    assert folder is not None
    lost = folder / "masks" / f"scene_{SMALL.first + 1:08d}.png"
    content = lost.read_bytes()
    lost.unlink()
    (chunk,) = labels.chunks(places)
    assert labels.missing(chunk) == ["seed+crf"]
    assert labels.make_labels(chunk) == SMALL.train
    assert lost.read_bytes() == content
    assert labels.chunks(places) == []


def test_a_training_that_lost_its_result_is_scored_again(
    places: Places, finished: dict[str, Any]
) -> None:
    del finished
    job = training.Job(places, Training("g4seg", 1))
    path = places.training(job.training) / "result.json"
    before = json.loads(path.read_text())
    path.unlink()
    # From its last checkpoint, which has all the steps.
    assert training.train(job) == before
    assert json.loads(path.read_text()) == before


def test_other_settings_have_other_places(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row: places.training(Training(row, 0)) for row in ROWS}
    assert len(set(rows.values())) == len(ROWS)
    longer = Places(places.root, replace(SMALL, steps=3))
    assert longer.labels("g4seg") == places.labels("g4seg")
    assert longer.training(Training("seed", 0)) != rows["seed"]
    monkeypatch.setitem(RECIPES, "g4seg-best", RECIPES["blur"])
    assert plan.recipe() == ("g4seg-best", RECIPES["blur"])
    changed = {row for row, path in rows.items() if places.training(Training(row, 0)) != path}
    assert changed == {"g4seg", "g4seg+crf"}
    monkeypatch.setattr(plan, "RECIPES", {"blur": RECIPES["blur"]})
    with pytest.raises(ConfigurationError, match="g4seg-best"):
        plan.recipe()


def row(name: str, miou: float, gain: float, error: float | None) -> dict[str, Any]:
    """A row of the table."""
    return {
        "name": name,
        "miou": miou,
        "miou_se": error,
        "label_miou": miou + 5,
        "gain": gain,
        "gain_se": error,
    }


def test_the_verdict_asks_for_two_standard_errors() -> None:
    seeds = row("seed", 50, 0, 0.5)
    assert "train a better network" in report.verdict([seeds, row("g4seg", 51.1, 1.1, 0.5)])
    short = report.verdict([seeds, row("g4seg", 50.9, 0.9, 0.5)])
    assert "do not train a better network" in short
    assert "+0.90 mIoU" in short
    assert "Too little" in report.verdict([seeds, row("g4seg", 51, 1, None)])
    assert "Too little" in report.verdict([seeds])


def test_gains_are_paired_by_training_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "label_miou", lambda *_: 1.0)
    scores = {"seed": (40.0, 50.0, 60.0), "g4seg": (42.0, 52.0, 63.0)}
    results = [
        {"row": name, "seed": seed, "miou": value, "val_miou": 0.0}
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]
    found = report.table(Places(Path(), SMALL), results)
    assert found[1]["gain"] == pytest.approx(7 / 3)
    # Deviation of 2, 2 and 3 over the root of three.
    assert found[1]["gain_se"] == pytest.approx(np.std([2, 2, 3], ddof=1) / 3**0.5)
    assert found[1]["miou_se"] == pytest.approx(np.std(scores["g4seg"], ddof=1) / 3**0.5)
