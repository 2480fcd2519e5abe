"""The functions behind `g4seg convert` and `g4seg check`."""

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from datamodules import FolderDataModule, VOCDataModule
from datamodules.check import check, data_of_run, inspect
from datamodules.convert import HARD, SourceDialect, TargetDialect, convert, main
from datamodules.seed_files import ReadOptions, detect, read_seed
from datamodules.seed_files.maps import Dialect
from datamodules.seed_files.writing import WritableDialect
from g4seg_pl.main import main as g4seg
from g4seg_pl.types import ConfigurationError

Maker = Callable[..., Path]
SIZE = (12, 17)
REPOSITORY = Path(__file__).parents[2]
SOFT = [dialect for dialect in get_args(TargetDialect) if dialect not in HARD]
NORMALISED = ("seam_crf", "weaktr")
ROUND = [dialect for dialect in SOFT if dialect not in NORMALISED]


def test_the_names_of_dialects_agree() -> None:
    assert get_args(SourceDialect) == ("auto", *get_args(Dialect))
    assert get_args(TargetDialect) == (*get_args(WritableDialect), "coco")


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(ROUND, 2)])
def test_any_dialect_becomes_any_other(
    first: TargetDialect, second: TargetDialect, tmp_path: Path, save_seed: Maker
) -> None:
    original = read_seed(save_seed(tmp_path / "in" / "a.npy", [3, 15]), SIZE, 20)
    assert convert(str(tmp_path / "in"), str(tmp_path / "one"), to_dialect=first) == 0
    assert convert(str(tmp_path / "one"), str(tmp_path / "two"), first, second) == 0
    (path,) = (tmp_path / "two").iterdir()
    assert detect(path) == second
    # Maps that peak below one half are absent from a plain array.
    kept = [i for i, score in enumerate(original.scores) if score.max() >= 0.5]
    seed = read_seed(path, SIZE, 20)
    for class_id, score in zip(seed.class_ids, seed.scores, strict=True):
        index = original.class_ids.index(class_id)
        np.testing.assert_allclose(score, original.scores[index], atol=1 / 255)
    assert {original.class_ids[index] for index in kept} <= set(seed.class_ids)


def test_label_images(tmp_path: Path, save_seed: Maker, save_label: Maker) -> None:
    save_seed(tmp_path / "in" / "a.npy", [3, 15])
    with pytest.raises(ConfigurationError, match="background"):
        convert(str(tmp_path / "in"), str(tmp_path / "out"), to_dialect="png")
    assert convert(str(tmp_path / "in"), str(tmp_path / "out"), "auto", "png", background=0.7) == 0
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.mode == "P"
        assert set(np.unique(np.array(image))) == {0, 15}
    assert convert(str(tmp_path / "out"), str(tmp_path / "irn"), "png", "irn") == 0
    assert read_seed(tmp_path / "irn" / "a.npy", SIZE, 20).class_ids == (15,)


def test_bad_files_are_named_and_skipped(
    tmp_path: Path, save_seed: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        save_seed(tmp_path / "in" / f"{name}.npy", [3])
    (tmp_path / "in" / "b.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "in" / "notes.txt").write_text("no seed")
    assert convert(str(tmp_path / "in"), str(tmp_path / "out"), to_dialect="npz") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.npz", "c.npz"]
    shown = capsys.readouterr().out
    size = (tmp_path / "out" / "a.npz").stat().st_size
    assert "b.npy" in shown
    assert "converted 2, skipped 1" in shown
    assert f"read 2 as clip_es; wrote 2, {size} bytes per image as npz" in shown


@pytest.mark.parametrize("dialect", NORMALISED)
def test_dialects_with_a_background(
    dialect: TargetDialect, tmp_path: Path, save_seed: Maker
) -> None:
    original = read_seed(save_seed(tmp_path / "in" / "a.npy", [3, 15]), SIZE, 20).scores
    assert convert(str(tmp_path / "in"), str(tmp_path / "one"), to_dialect=dialect) == 0
    assert detect(tmp_path / "one" / "a.npy") == dialect
    assert convert(str(tmp_path / "one"), str(tmp_path / "two"), dialect, "clip_es") == 0
    seed = read_seed(tmp_path / "two" / "a.npy", SIZE, 20)
    total = 1 - original.amax(0) + original.sum(0)
    np.testing.assert_allclose(seed.scores, original / total, atol=2e-3)


def save_columns(path: Path) -> NDArray[np.uint8]:
    """A label image with people, a gap of unsure pixels and a bird, and what it reads as."""
    label = np.zeros(SIZE, np.uint8)
    label[2:7, :9], label[4:, 12:], label[0] = 15, 3, 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(path)
    return np.where(label == 255, 0, label).astype(np.uint8)


# pycocotools 2.0.11's arrays do not know NumPy 2's `copy` argument.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_json_goes_there_and_back(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="extra: coco")
    labels = {name: save_columns(tmp_path / "in" / f"{name}.png") for name in ("street", "lake")}
    folders = {name: str(tmp_path / name) for name in ("in", "out", "back")}
    with pytest.raises(ConfigurationError, match="background"):
        convert(folders["in"], folders["out"], to_dialect="coco")
    assert main(["--from=png", "--to=coco", "--background=0.5", folders["in"], folders["out"]]) == 0
    path = tmp_path / "out" / "seeds.json"
    with contextlib.redirect_stdout(None):
        read = coco.COCO(str(path))
    assert {row["name"] for row in read.loadCats(read.getCatIds())} >= {"bird", "person"}
    for row in read.loadImgs(read.getImgIds()):
        label = np.zeros(SIZE, np.uint8)
        for each in read.loadAnns(read.getAnnIds(row["id"])):
            mask = read.annToMask(each) == 1
            assert each["area"] == mask.sum()
            label[mask] = each["category_id"]
        np.testing.assert_array_equal(label, labels[row["file_name"].removesuffix(".jpg")])
    assert main([str(path), folders["back"], "--to=png", "--background=0.5"]) == 0
    for name, label in labels.items():
        with Image.open(tmp_path / "back" / f"{name}.png") as image:
            np.testing.assert_array_equal(np.array(image), label)


def test_coco_images_in_which_nothing_was_found_are_kept_on_request(
    tmp_path: Path, save_image: Maker
) -> None:
    pytest.importorskip("pycocotools", reason="extra: coco")
    file = tmp_path / "seeds.json"
    sizes = {"height": SIZE[0], "width": SIZE[1]}
    images = [{"id": number, "file_name": f"{number}.jpg", **sizes} for number in (1, 2)]
    runs = {"size": [*SIZE], "counts": [0, SIZE[0] * SIZE[1]]}
    masks = [{"image_id": 1, "category_id": 3, "segmentation": runs}]
    named = [{"id": 3, "name": "bird"}]
    file.write_text(json.dumps({"images": images, "annotations": masks, "categories": named}))
    for number in (1, 2):
        save_image(tmp_path / "images" / f"{number}.jpg")

    def unusable(options: ReadOptions | None) -> list[str]:
        place = {"class_names": "voc", "seed_options": options, "num_workers": 0}
        data = FolderDataModule(tmp_path / "images", file, **place)
        return list(inspect(data, full=True).complaints)

    assert unusable(None) == ["2"]
    assert unusable(ReadOptions(empty="keep")) == []


def test_coco_keeps_its_own_numbers(tmp_path: Path, save_image: Maker) -> None:
    pytest.importorskip("pycocotools", reason="extra: coco")
    name = "COCO_val2014_000000000042"
    save_columns(tmp_path / "in" / f"{name}.png")
    folders = [str(tmp_path / "in"), str(tmp_path / "out")]
    assert convert(*folders, to_dialect="coco", class_names="coco", background=0.5) == 0
    content = json.loads((tmp_path / "out" / "seeds.json").read_text())
    assert [row["id"] for row in content["images"]] == [42]
    # The fifteenth thing is the bird, whose category id is 16; the third is the car, 3.
    assert [row["category_id"] for row in content["annotations"]] == [3, 16]
    assert content["categories"][79] == {"id": 90, "name": "toothbrush"}
    # As a list of results nothing names the images: the folder of pictures does.
    results = tmp_path / "results.json"
    results.write_text(json.dumps(content["annotations"]))
    back = {"class_names": "coco", "options": ReadOptions(category_ids="coco91")}
    with pytest.raises(ConfigurationError, match="have masks but no name"):
        convert(str(results), str(tmp_path / "npz"), **back)
    for image in (name, "COCO_val2014_000000000043"):
        save_image(tmp_path / "images" / f"{image}.jpg")
    assert (
        convert(str(results), str(tmp_path / "npz"), images=str(tmp_path / "images"), **back) == 0
    )
    assert [path.stem for path in (tmp_path / "npz").iterdir()] == [name]


def test_an_unfinished_coco_file_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="extra: coco")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.npy").write_bytes(b"\x93NUMPY")
    folders = [str(tmp_path / "in"), str(tmp_path / "out")]
    assert convert(*folders, to_dialect="coco", background=0.5) == 1
    assert not (tmp_path / "out").exists()


def test_the_command_line(
    tmp_path: Path, save_seed: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    save_seed(tmp_path / "in" / "a.npy", [3, 15])
    folders = [str(tmp_path / "in"), str(tmp_path / "out")]
    for dialect in ("auto", "clip_es"):
        assert g4seg(["convert", "--from", dialect, "--to", "irn", *folders]) == 0
    with pytest.raises(SystemExit):
        g4seg(["convert", "--from", "irm", *folders])
    assert g4seg(["convert", "--from", "seam", *folders]) == 1
    assert "not of dialect seam" in capsys.readouterr().out
    options = ["--options.activation", "byte", "--class-names", "voc"]
    assert g4seg(["convert", *folders, *options]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.npy", "a.npz"]


def test_reduced_resolution(tmp_path: Path, save_seed: Maker, save_image: Maker) -> None:
    save_seed(tmp_path / "in" / "a.npy", [3])
    save_image(tmp_path / "images" / "a.jpg")
    arguments = (str(tmp_path / "in"), str(tmp_path / "out"))
    with pytest.raises(ConfigurationError, match="stride"):
        convert(*arguments, to_dialect="irn", stride=2)
    assert convert(*arguments, to_dialect="npz", stride=4) == 0
    with np.load(tmp_path / "out" / "a.npz") as content:
        assert content["foreground"].shape == (1, 3, 5)
        assert content["image_size"].tolist() == list(SIZE)
    back = (str(tmp_path / "out"), str(tmp_path / "back"), "npz", "clip_es")
    assert convert(*back) == 0  # the file knows its image's size
    assert read_seed(tmp_path / "back" / "a.npy", SIZE, 20).scores.shape == (1, *SIZE)
    assert convert(*back, images=str(tmp_path / "images")) == 0
    assert read_seed(tmp_path / "back" / "a.npy", SIZE, 20).scores.shape == (1, *SIZE)


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="seeds: no folder"):
        convert(str(tmp_path / "none"), str(tmp_path / "out"), to_dialect="npz")
    (tmp_path / "in").mkdir()
    assert convert(str(tmp_path / "in"), str(tmp_path / "out"), to_dialect="npz") == 1


def test_check_of_a_sound_data_set(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = voc.parent.parent / "cam_out"
    data = VOCDataModule(voc, seeds, labels="annotations", num_workers=0)
    assert check(data, truth=True, seconds_per_image=3600) == 0
    shown = capsys.readouterr().out
    assert "2 images, 2 with ground truth, 0 unusable" in shown
    assert "2 person" in shown
    assert "seeds are read as clip_es" in shown
    assert "about 2.0 h" in shown


def test_check_says_that_so_many_classes_cannot_be_written(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"thing {number}\n" for number in range(255)))
    data = VOCDataModule(voc, voc.parent.parent / "cam_out", class_names=names, num_workers=0)
    assert check(data) == 1
    assert "data.class_names: 255 classes, but masks" in capsys.readouterr().out


def test_check_reports_everything_at_once(
    voc: Path, save_label: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = voc.parent.parent / "cam_out"
    (seeds / "a.npy").unlink()
    (voc / "JPEGImages" / "a.jpg").unlink()
    (voc / "Annotations" / "a.xml").unlink()
    Image.new("L", (5, 5)).save(voc / "SegmentationClassAug" / "d.png")
    (seeds / "e.npy").write_bytes(b"")
    data = VOCDataModule(voc, seeds, "train_aug", labels="annotations", num_workers=0)
    report = inspect(data, truth=True)
    assert {name: len(found) for name, found in report.complaints.items()} == {
        "a": 3,
        "d": 1,
        "e": 1,
    }
    assert report.histogram == {"bird": 3, "person": 3}
    assert check(data, truth=True) == 1
    shown = capsys.readouterr().out
    for word in ("a.jpg", "a.npy", "a.xml", "d.png", "e.npy"):
        assert word.removesuffix(".npy") in shown


def test_check_names_seeds_that_cannot_be_of_the_forced_dialect(
    voc: Path, save_label: Maker
) -> None:
    seeds = voc.parent.parent / "cam_out"
    (seeds / "a.npy").unlink()
    save_label(seeds / "a.png", [3, 15])
    assert inspect(VOCDataModule(voc, seeds, num_workers=0)).complaints == {}
    report = inspect(VOCDataModule(voc, seeds, dialect="clip_es", num_workers=0))
    assert list(report.complaints) == ["a"]
    assert "a .png file where dialect=clip_es" in report.complaints["a"][0]


def test_a_full_check_decodes_everything(voc: Path) -> None:
    seeds = voc.parent.parent / "cam_out"
    path = voc / "JPEGImages" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    data = VOCDataModule(voc, seeds, num_workers=0)
    assert inspect(data).complaints == {}
    report = inspect(data, full=True)
    assert list(report.complaints) == ["a"]
    assert report.histogram == {"bird": 1, "person": 1}


@pytest.mark.parametrize("spelled", ["-c", "--config", "--config="])
def test_check_takes_a_runs_file(
    spelled: str, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = REPOSITORY / "configs" / "refine" / "voc_clip_es.yaml"
    words = [f"{spelled}{run}"] if spelled.endswith("=") else [spelled, str(run)]
    seeds = voc.parent.parent / "cam_out"
    words += ["-c", str(run.with_name("best.yaml")), "--model.model", "nowhere", "--out=x"]
    words += ["--data.root", str(voc), "--data.seeds", str(seeds), "--data.num_workers", "0"]
    assert g4seg(["check", *words]) == 0
    assert "2 images" in capsys.readouterr().out
    (seeds / "c.npy").unlink()
    assert g4seg(["check", *words, "--data.split", "val", "--truth", "true"]) == 1
    shown = capsys.readouterr().out
    assert "1 images, 1 with ground truth, 1 unusable" in shown
    assert str(seeds / "c") in shown


@pytest.mark.parametrize("between", [["--override"], ["--model.seed", "-1"], ["--out=x"]])
@pytest.mark.parametrize("spelled", ["-c {}", "-c={}", "--config {}", "--config={}"])
def test_check_takes_no_file_for_the_value_of_a_flag(
    spelled: str, between: list[str], tmp_path: Path
) -> None:
    files = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    for file in files:
        file.write_text(f"data:\n  class_path: {file.stem}\n")
    one, two = (spelled.format(file).split(" ") for file in files)
    found = data_of_run([*one, *between, *two, "--truth", "true"])
    data = [word for file in files for word in ("--data", json.dumps({"class_path": file.stem}))]
    assert found == [*data, "--truth", "true"]


@pytest.mark.parametrize("content", ["model: {}", "- data", "data: [", None])
def test_check_names_a_file_that_is_no_runs(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.yaml"
    if content is not None:
        run.write_text(content)
    assert g4seg(["check", "-c", str(run)]) == 1
    assert f"-c {run}" in capsys.readouterr().err


def test_importing_the_commands_is_quick() -> None:
    """`g4seg --help` imports them for their signatures."""
    code = (
        "import sys, datamodules, datamodules.convert, datamodules.check; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
