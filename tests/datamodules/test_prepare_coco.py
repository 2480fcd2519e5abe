"""`g4seg prepare coco` on a small instances JSON, against masks drawn by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from datamodules import COCODataModule, prepare_coco
from g4seg_pl.main import main
from g4seg_pl.types import Sample

SIZE = (12, 17)
NAMES = ("000000000009", "000000000025", "000000000030")
CATEGORIES = {1: "person", 47: "cup", 67: "dining table"}
LABELS = {1: 1, 47: 42, 67: 61}
"""Label value of each category id: its place among COCO's eighty things."""


def box(top: int, left: int, bottom: int, right: int) -> NDArray[np.bool_]:
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def runs(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Uncompressed run lengths, column by column, beginning with zeros."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(int)))
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(SIZE), "counts": lengths}


def polygon(top: int, left: int, bottom: int, right: int) -> list[list[float]]:
    corners = [left, top, right, top, right, bottom, left, bottom]
    return [[float(value) for value in corners]]


CUP, TABLE, CROWD = (4, 4, 7, 7), (2, 1, 10, 12), (0, 10, 6, 16)


@pytest.fixture
def instances(tmp_path: Path) -> Path:
    """A cup, listed first, on a table; a crowd beside both; an empty image; one more person."""
    pytest.importorskip("pycocotools", reason="extra: coco")
    rows = [
        (9, 47, polygon(*CUP), 0),
        (9, 67, runs(box(*TABLE)), 0),
        (9, 1, runs(box(*CROWD)), 1),
        (30, 1, runs(box(1, 1, 3, 3)), 0),
    ]
    content = {
        "images": [
            {"id": int(name), "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for name in NAMES
        ],
        "annotations": [
            {"id": index, "image_id": image, "category_id": c, "segmentation": s, "iscrowd": crowd}
            for index, (image, c, s, crowd) in enumerate(rows, start=1)
        ],
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    return path


def prepare(instances: Path, out: Path, *more: str) -> int:
    return main(["prepare", "coco", "--instances", str(instances), "--out", str(out), *more])


def expected(on_top: str, crowd: int) -> NDArray[np.uint8]:
    """The table has 88 pixels, the crowd 36, the cup 9."""
    order = {"smaller": (TABLE, CROWD, CUP), "later": (CUP, TABLE, CROWD)}[on_top]
    values = {CUP: LABELS[47], TABLE: LABELS[67], CROWD: crowd}
    label = np.zeros(SIZE, np.uint8)
    for corners in order:
        label[box(*corners)] = values[corners]
    return label


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ([], expected("smaller", LABELS[1])),
        (["--on-top", "later"], expected("later", LABELS[1])),
        (["--crowd", "ignore"], expected("smaller", 255)),
    ],
)
def test_instances_become_one_label_image(
    options: list[str], label: NDArray[np.uint8], instances: Path, tmp_path: Path
) -> None:
    assert prepare(instances, tmp_path / "out", *options) == 0
    folder = tmp_path / "out" / "SegmentationClass" / "val2017"
    np.testing.assert_array_equal(read(folder / f"{NAMES[0]}.png"), label)
    assert not read(folder / f"{NAMES[1]}.png").any()
    assert sorted(path.stem for path in folder.glob("*.png")) == sorted(NAMES)
    listed = (tmp_path / "out" / "ImageLabels" / "val2017.txt").read_text().splitlines()
    assert listed == [f"{NAMES[0]} 0 41 60", f"{NAMES[2]} 0"]


@pytest.mark.parametrize("layout", ["semantic", "object"])
def test_the_data_module_finds_what_was_written(
    layout: str, instances: Path, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    assert prepare(instances, tmp_path, "--layout", layout) == 0
    for name in NAMES:
        save_image(tmp_path / "val2017" / f"{name}.jpg")
    labels = tmp_path / "ImageLabels" / "val2017.txt"
    data = COCODataModule(tmp_path, labels=str(labels), num_workers=0, batch_size=3)
    (batch,) = data.test_dataloader()
    first = batch[0]
    assert isinstance(first, Sample)
    assert first.truth is not None
    np.testing.assert_array_equal(first.truth.numpy(), expected("smaller", 1))
    assert first.class_names == ("person", "cup", "dining table")


def test_a_second_run_writes_what_is_missing(
    instances: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    folder = out / "SegmentationClass" / "val2017"
    assert prepare(instances, out) == 0
    kept, missing = folder / f"{NAMES[1]}.png", folder / f"{NAMES[0]}.png"
    kept.write_bytes(b"as it was")
    missing.unlink()
    assert prepare(instances, out) == 0
    assert "wrote 1, kept 2, skipped 0" in capsys.readouterr().out
    assert kept.read_bytes() == b"as it was"
    assert missing.is_file()
    assert prepare(instances, out, "--on-top", "later") == 1
    assert "or --override" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_coco, "paint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(instances, out, "--on-top", "later", "--override")
    assert not missing.is_file(), "it would be kept by the run that goes on"
    assert prepare(instances, out, "--on-top", "later") == 0
    np.testing.assert_array_equal(read(missing), expected("later", 1))
    assert not read(kept).any()


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_bad_annotations_are_named_and_the_rest_is_written(
    instances: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(instances.read_text())
    content["annotations"][0]["segmentation"] = {"size": [3, 3], "counts": [9]}
    instances.write_text(json.dumps(content))
    assert prepare(instances, tmp_path / "out") == 1
    shown = capsys.readouterr().out
    assert f"skipped {NAMES[0]}: {instances}: a mask of size (3, 3)" in shown
    assert "wrote 2, kept 0, skipped 1" in shown
    folder = tmp_path / "out" / "SegmentationClass" / "val2017"
    assert {path.name for path in folder.iterdir()} == {
        f"{NAMES[1]}.png",
        f"{NAMES[2]}.png",
        "prepared.json",
    }
    content["categories"][0]["name"] = "dragon"
    instances.write_text(json.dumps(content))
    assert prepare(instances, tmp_path / "out", "--override", "true") == 1
    assert "unknown class 'dragon'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"), [("{", "no readable COCO JSON"), ('{"annotations": []}', "category_ids")]
)
def test_files_that_are_no_instances(
    text: str, said: str, instances: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    instances.write_text(text)
    assert prepare(instances, tmp_path / "out") == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_name_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["prepare"])
    assert "{coco,scenes}" in capsys.readouterr().err


def test_scenes_are_prepared_by_the_same_command(tmp_path: Path) -> None:
    words = ["scenes", "--count", "2", "--split", "val", "--out", str(tmp_path / "VOC2012")]
    assert main(["prepare", *words]) == 0
    assert len(list((tmp_path / "VOC2012" / "SegmentationClass").glob("*.png"))) == 2
