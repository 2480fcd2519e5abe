"""`g4seg evaluate` on files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from g4seg_pl.evaluation.evaluate import evaluate, score_image, summarise
from g4seg_pl.main import main
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


def square(left: int) -> np.ndarray:
    """A square of 20 by 20 pixels of class 1 in a picture of 40 by 40."""
    labels = np.zeros((40, 40), np.uint8)
    labels[10:30, left : left + 20] = 1
    return labels


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


def test_boundary_scores_of_a_shifted_square_are_those_counted_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two pictures, one square 2 pixels off and one in its place; counts add up over both.

    Bands are 1 pixel wide, 2 % of the diagonal. Those of class 1 are rings of 4 * 19 = 76 pixels,
    of which the shifted square shares its upper and lower edge, 2 * 18 = 36. Those of class 0 are
    the picture's border, 4 * 39 = 156, and the ring around the square, 4 * 21 = 84, of which it
    shares 2 * 20 = 40.

    The trimap reaches 5 pixels to either side: 30 * 30 pixels without the 4 at the corners, which
    lie 5 diagonal steps off, and without the 10 * 10 in the middle, 796; 300 are of class 1 in
    the truth, 300 in the prediction (the middle lies in both squares), 18 * 20 - 100 = 260 in both.
    """
    truths = {"off": square(10), "right": square(10)}
    pred = write(tmp_path / "pred", truths | {"off": square(12)})
    evaluate(pred, write(tmp_path / "gt", truths), 2, json=tmp_path / "s.json", boundary=True)
    scores = json.loads((tmp_path / "s.json").read_text())
    bands = [(156 + 40 + 240) / (240 + 240 - 196 + 240), (36 + 76) / (76 + 76 - 36 + 76)]
    within = [(796 - 340 + 496) / (796 - 260 + 496), (260 + 300) / (340 + 300)]
    assert scores["boundary_iou"] == pytest.approx(100 * np.mean(bands))
    assert scores["trimap_miou"] == pytest.approx(100 * np.mean(within))
    printed = capsys.readouterr().out
    assert f"boundary IoU {100 * np.mean(bands):.2f} %" in printed
    assert f"trimap mIoU {100 * np.mean(within):.2f} %" in printed


def test_images_without_a_label_change_have_no_trimap_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "gt", {"a": square(10) * 0, "b": square(10) * 0 + 1})
    words = ["evaluate", "--pred", str(folder), "--gt", str(folder), "--num-classes", "2"]
    file = tmp_path / "s.json"
    assert main([*words, "--boundary", "true", "--json", str(file)]) == 0
    scores = json.loads(file.read_text())
    assert (scores["miou"], scores["trimap_miou"]) == (100, None)
    assert "trimap mIoU - %" in capsys.readouterr().out


def test_a_band_that_no_class_has_is_none_in_json() -> None:
    plain = np.ones((4, 4), np.uint8)
    score = replace(score_image(plain, plain, 2, boundary=True), boundary=np.zeros((2, 2), int))
    scores = summarise([score])
    assert scores["boundary_iou"] is None
    assert "NaN" not in json.dumps(scores)


def test_boundaries_are_not_scored_unasked(tmp_path: Path) -> None:
    folder = write(tmp_path / "gt", {"a": square(10)})
    evaluate(folder, folder, 2, json=tmp_path / "s.json")
    assert not {"boundary_iou", "trimap_miou"} & set(json.loads((tmp_path / "s.json").read_text()))


def test_excluded_pixels_cost_nothing_at_the_boundary_either() -> None:
    """A prediction right wherever it says anything is perfect, unless 255 means background."""
    truth, prediction = square(10), square(10)
    prediction[5:20, 25:40] = 255
    for rule, perfect in (("exclude", True), ("background", False)):
        score = score_image(prediction, truth, 2, rule, boundary=True)  # type: ignore[arg-type]
        for counts in (score.boundary, score.trimap):
            assert counts is not None
            assert (counts[1] > 0).all()
            assert (counts[0] == counts[1]).all() == perfect


def test_255_that_means_background_is_background_at_the_boundary_too() -> None:
    truth, prediction = square(10), square(12)
    filled = prediction.copy()
    prediction[prediction == 0] = 255
    found = score_image(prediction, truth, 2, "background", boundary=True)
    expected = score_image(filled, truth, 2, "background", boundary=True)
    for name in ("overlap", "boundary", "trimap"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


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


UNLABELLED = ("--gt-zero ignore", {"truth_zero": "ignored"}, "0 in truth: ignored")
FROM_0 = ("--gt-offset -1", {"truth_offset": -1}, "subtracted from its other values: -1;")
ADE20K = [[0, 0, 1, 1], [0, 2, 2, 1], [3, 3, 2, 255]]
CONTEXT = [[0, 1, 1, 1], [0, 2, 0, 1], [3, 3, 2, 2]]
NIGHTCITY = [[255, 255, 0, 0], [255, 1, 1, 0], [2, 2, 1, 255]]


@pytest.mark.parametrize(
    ("values", "suffix", "unlabelled", "shift", "rules"),
    [
        pytest.param(ADE20K, ".png", 0, 0, UNLABELLED, id="ade20k"),
        pytest.param(CONTEXT, ".png", 0, 0, UNLABELLED, id="context59"),
        pytest.param(NIGHTCITY, "_trainIds.png", 255, 1, FROM_0, id="nightcity"),
    ],
)
def test_truth_of_every_numbering(
    values: list[list[int]],
    suffix: str,
    unlabelled: int,
    shift: int,
    rules: tuple[str, dict[str, object], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Masks count classes from 1 whatever the truth does; without the option scores are others."""
    option, recorded, told = rules
    truth = np.array(values, np.uint8)
    prediction = np.array([[1, 0, 1, 1], [2, 2, 2, 1], [3, 0, 1, 3]], np.uint8)
    gt = write(tmp_path / "gt", {f"street{suffix.removesuffix('.png')}": truth})
    pred = write(tmp_path / "pred", {"street": prediction})
    words = ["evaluate", "--pred", str(pred), "--gt", str(gt), "--num-classes", "4"]
    words += ["--gt-suffix", suffix, "--json", str(tmp_path / "scores.json")]

    def scores(more: list[str]) -> dict[str, Any]:
        assert main([*words, *more]) == 0
        read: dict[str, Any] = json.loads((tmp_path / "scores.json").read_text())
        return read

    plain = scores([])
    assert told not in capsys.readouterr().out
    right = scores(option.split())
    assert told in capsys.readouterr().out
    assert {name: right[name] for name in right.keys() - plain.keys()} == recorded
    kept = (truth != 255) & (truth != unlabelled)
    t, p = truth[kept] + shift, prediction[kept]
    iou = [((t == k) & (p == k)).sum() / ((t == k) | (p == k)).sum() for k in (1, 2, 3)]
    assert right["miou"] == pytest.approx(100 * np.mean(iou))
    assert right["iou"] == [None, *(pytest.approx(100 * each) for each in iou)]
    assert plain["miou"] != pytest.approx(right["miou"])


def test_zero_of_the_file_is_looked_for_before_the_offset(tmp_path: Path) -> None:
    """ADE20K for predictions that count its classes from 0: 0 is ignored, 1 becomes 0."""
    gt = write(tmp_path / "gt", {"a": np.array([[0, 1], [2, 255]], np.uint8)})
    pred = write(tmp_path / "pred", {"a": np.array([[1, 0], [1, 0]], np.uint8)})
    evaluate(pred, gt, 2, json=tmp_path / "s.json", gt_offset=1, gt_zero="ignore")
    assert json.loads((tmp_path / "s.json").read_text())["iou"] == [100, 100]


def test_truth_that_the_offset_leads_astray_is_named(tmp_path: Path) -> None:
    gt = write(tmp_path / "gt", {"a": np.array([[0, 1], [2, 255]], np.uint8)})
    said = r"gt/a\.png: label values \[0\] .*--gt-offset 1; --gt-zero ignore leaves out 0"
    with pytest.raises(BadItemError, match=said):
        evaluate(gt, gt, 3, gt_offset=1)
    said = r"gt/a\.png: label values \[2\] .*--num-classes is 3 .*--gt-offset -1"
    with pytest.raises(BadItemError, match=said):
        evaluate(gt, gt, 3, gt_offset=-1)
    (gt / "a.png").write_bytes(b"not a picture")
    pred = write(tmp_path / "pred", {"a": np.zeros((2, 2), np.uint8)})
    with pytest.raises(BadItemError, match=r"gt/a\.png cannot be read"):
        evaluate(pred, gt, 3, gt_offset=-1)


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
