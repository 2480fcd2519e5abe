"""Thresholds without ground truth, and swept ones that are reported on another split."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
from fake_voc import IDS, write_voc
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from g4seg_pl.evaluation.confusion import overlaps_of
from g4seg_pl.evaluation.threshold import otsu_threshold
from g4seg_pl.main import main
from g4seg_pl.types import ConfigurationError


@given(st.lists(st.integers(0, 50), min_size=3, max_size=16))
@example([0, 0, 1, 0, 2, 0])  # rounding made a cut above everything the best
def test_otsu_has_the_least_variance_within(counts: list[int]) -> None:
    """Written out: of all cuts the one that leaves the least variance within the two parts."""
    if sum(count > 0 for count in counts) < 2:
        with pytest.raises(ConfigurationError, match="one score only"):
            otsu_threshold(np.array(counts))
        return
    values = np.repeat((np.arange(len(counts)) + 0.5) / len(counts), counts)

    def within(cut: float) -> float:
        parts = values[values < cut], values[values >= cut]
        return float(sum(((part - part.mean()) ** 2).sum() for part in parts if len(part)))

    cuts = [step / len(counts) for step in range(1, len(counts))]
    assert within(otsu_threshold(np.array(counts))) == pytest.approx(min(map(within, cuts)))


def test_otsu_lies_between_two_peaks() -> None:
    counts = np.zeros(100, np.int64)
    counts[[20, 79]] = 5
    assert otsu_threshold(counts) == pytest.approx(0.5, abs=0.011)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images to choose on, one to report on."""
    voc = write_voc(tmp_path)
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("\n".join(IDS[:2]))
    (lists / "val.txt").write_text(IDS[2])
    return tmp_path


def words(root: Path, name: str, split: str) -> list[str]:
    given = {"root": root / "VOCdevkit" / "VOC2012", "seeds": root / "cam_out", "split": split}
    options = [word for key, value in given.items() for word in (f"--{name}.{key}", str(value))]
    return [f"--{name}", "datamodules.VOCDataModule", *options, f"--{name}.num-workers", "0"]


def test_a_threshold_from_the_seeds_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (root / "VOCdevkit" / "VOC2012" / "SegmentationClass").iterdir():
        path.unlink()  # no truth anywhere
    file = root / "threshold.json"
    assert main(["threshold", "otsu", *words(root, "data", "train"), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    # Scores are 0, 0.45 and 0.9.
    assert 0 < found["threshold"] < 0.9
    assert (found["ground_truth"], found["images"]) == ("not used", 2)
    assert f"background.init_args.value {found['threshold']:g}" in capsys.readouterr().out


def mean_iou_at(root: Path, names: tuple[str, ...], threshold: float) -> float:
    """By plain loops over the classes that occur."""
    cells = []
    for name in names:
        seed = np.load(root / "cam_out" / f"{name}.npy", allow_pickle=True).item()
        scores = np.concatenate(
            [
                np.full((1, *seed["attn_highres"].shape[1:]), threshold),
                seed["attn_highres"].astype(np.float64),
            ]
        )
        label = np.array([0, *(seed["keys"] + 1)])[scores.argmax(0)]
        folder = root / "VOCdevkit" / "VOC2012" / "SegmentationClass"
        with Image.open(folder / f"{name}.png") as image:
            truth = np.array(image)
        cells.append((label[truth != 255], truth[truth != 255]))
    label, truth = (np.concatenate(each) for each in zip(*cells, strict=True))
    ious = [
        ((label == k) & (truth == k)).sum() / ((label == k) | (truth == k)).sum()
        for k in np.union1d(label, truth)
    ]
    return 100 * float(np.mean(ious))


def test_a_sweep_reports_on_another_split(root: Path) -> None:
    given = [*words(root, "choose", "train"), *words(root, "report", "val")]
    file = root / "sweep.json"
    grid = [0.2, 0.6, 0.95]
    given += ["--thresholds", str(grid), "--json", str(file)]
    assert main(["threshold", "sweep", *given]) == 0
    found = json.loads(file.read_text())
    expected = {value: mean_iou_at(root, IDS[:2], value) for value in grid}
    assert found["curve"] == {str(k): pytest.approx(v) for k, v in expected.items()}
    assert found["threshold"] == max(grid, key=expected.__getitem__)
    assert found["miou"] == pytest.approx(mean_iou_at(root, IDS[2:], found["threshold"]))
    assert (found["chosen_on"], found["reported_on"]) == ("train", "val")


def test_choosing_keeps_the_counts_of_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: COCO's at 19 thresholds are gigabytes."""
    ids = [f"2007_{number:06d}" for number in range(10)]
    lists = write_voc(tmp_path, ids) / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("\n".join(ids[:9]))
    (lists / "val.txt").write_text(ids[9])
    made: list[weakref.ref[NDArray[np.int64]]] = []
    alive: list[int] = []

    def watched(counts: NDArray[np.int64]) -> NDArray[np.int64]:
        found = overlaps_of(counts)
        if len(found) > 1:  # thresholds: the report has one
            made.append(weakref.ref(found))
            alive.append(sum(each() is not None for each in made))
        return found

    monkeypatch.setattr("g4seg_pl.evaluation.threshold.overlaps_of", watched)
    given = [*words(tmp_path, "choose", "train"), *words(tmp_path, "report", "val")]
    assert main(["threshold", "sweep", *given, "--thresholds", "[0.2, 0.6]"]) == 0
    assert len(alive) == 9
    assert max(alive) <= 2  # that of the image before lives until it is replaced


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--report.split", "train"], "2 images are in both splits"), (["--thresholds", "[0]"], "0")],
)
def test_unfair_or_senseless_sweeps(
    more: list[str], said: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words(root, "choose", "train"), *words(root, "report", "val"), *more]
    assert main(["threshold", "sweep", *given]) == 1
    assert said in capsys.readouterr().err
