"""`g4seg evaluate` on files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from g4seg_pl.evaluation.evaluate import evaluate
from g4seg_pl.types import BadItemError, ConfigurationError


def write(folder: Path, maps: dict[str, np.ndarray]) -> Path:
    """A folder of label files."""
    folder.mkdir(parents=True)
    for name, labels in maps.items():
        Image.fromarray(labels).save(folder / f"{name}.png")
    return folder


def random_maps(seed: int) -> dict[str, np.ndarray]:
    """Three label maps of different sizes with 255 in them."""
    rng = np.random.default_rng(seed)
    values = np.array([0, 1, 2, 255], np.uint8)
    return {name: rng.choice(values, (6 + i, 9)) for i, name in enumerate("abc")}


@pytest.mark.parametrize("rule", ["background", "exclude"])
def test_scores_are_those_of_a_histogram(tmp_path: Path, rule: str) -> None:
    predictions, truths = random_maps(0), random_maps(1)
    pred, gt = write(tmp_path / "pred", predictions), write(tmp_path / "gt", truths)
    evaluate(pred, gt, 3, json=tmp_path / "scores.json", pred_255=rule)  # type: ignore[arg-type]
    p = np.concatenate([predictions[name].ravel() for name in "abc"])
    t = np.concatenate([truths[name].ravel() for name in "abc"])
    kept = (t != 255) & ((p != 255) | (rule == "background"))
    p = np.where(p == 255, 0, p)
    counts = np.histogram2d(t[kept], p[kept], bins=(range(4), range(4)))[0]
    iou = np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))
    scores = json.loads((tmp_path / "scores.json").read_text())
    np.testing.assert_allclose(scores["iou"], 100 * iou)
    assert scores["miou"] == pytest.approx(100 * iou.mean())
    assert scores["n_images"] == 3


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    predictions = random_maps(0)
    pred, gt = write(tmp_path / "pred", predictions), write(tmp_path / "gt", random_maps(1))
    (pred / "a.png").unlink()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(pred / "b.png")
    (pred / "c.png").write_bytes(b"not a picture")
    with pytest.raises(BadItemError, match="3 of 3 images") as error:
        evaluate(pred, gt, 3)
    assert all(f"{name}.png" in str(error.value) for name in "abc")


def test_too_few_classes_name_the_truth_that_has_more(tmp_path: Path) -> None:
    pred, gt = write(tmp_path / "pred", random_maps(0)), write(tmp_path / "gt", random_maps(1))
    with pytest.raises(BadItemError, match=r"gt/a\.png: truth holds label 2, .* is 2"):
        evaluate(pred, gt, 2)


def test_split_list_may_hold_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "gt", random_maps(1))
    lines = tmp_path / "list.txt"
    lines.write_text("/JPEGImages/a.jpg /SegmentationClassAug/a.png\nb.png\nc\n")
    evaluate(folder, folder, 3, split_list=lines)
    printed = capsys.readouterr().out
    assert "images: 3" in printed
    assert f"split: {lines}" in printed
    lines.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"split_list: .*list\.txt is not a text file"):
        evaluate(folder, folder, 3, split_list=lines)


@pytest.mark.parametrize(("option", "least"), [("threads", 1), ("resamples", 2)])
def test_too_few_are_refused(tmp_path: Path, option: str, least: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{option} is {least - 1}: give {least} or more"):
        evaluate(tmp_path, tmp_path, 3, **{option: least - 1})


def test_what_changed_the_masks_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    folder = write(out / "masks", random_maps(1))
    crf = {"class_path": "g4seg_pl.callbacks.crf.DenseCRF", "init_args": {}}
    for changed_by, told in (([], "nothing"), ([crf], "DenseCRF")):
        record = {"background_rule": "Threshold(0.3)", "config": {"changed_by": changed_by}}
        (out / "run.json").write_text(json.dumps(record))
        evaluate(out, folder, 3)
        assert f"masks changed by: {told}" in capsys.readouterr().out
