"""VOC on a fake tree: what is listed, read and labelled."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_reading import ids, module, read_all, seeds_of

from datamodules import (
    VOCDataModule,
)
from datamodules.classes import read_class_list
from datamodules.items import parse_line
from datamodules.labels import FileLabels
from g4seg_pl.types import BadItemError, FailedSample, Sample


def test_a_sample(voc: Path) -> None:
    samples = read_all(module(voc), test=True)
    assert len(samples) == 2
    sample = samples[0]
    assert isinstance(sample, Sample)
    assert sample.image_id == "a"
    assert sample.image.dtype == torch.uint8
    assert sample.image.shape == (3, 12, 17)
    assert sample.seed.class_ids == (3, 15)
    assert sample.seed.scores.shape == (2, 12, 17)
    assert sample.class_names == ("bird", "person")
    assert sample.truth is not None
    assert sample.truth.unique().tolist() == [0, 3, 255]
    assert sample.image_path == voc / "JPEGImages" / "a.jpg"


def test_prediction_does_not_read_truth(voc: Path) -> None:
    assert all(isinstance(s, Sample) and s.truth is None for s in read_all(module(voc)))


@pytest.mark.parametrize("above", [0, 1, 2])
def test_the_root_or_its_parents(above: int, voc: Path) -> None:
    root = [voc, *voc.parents][above]
    assert ids(VOCDataModule(root, seeds_of(voc), num_workers=0)) == ["a", "b"]


def test_train_aug_is_derived_without_a_list(voc: Path) -> None:
    data = module(voc, "train_aug")
    assert ids(data) == ["a", "b", "d", "e"]
    assert all(item.truth and item.truth.parent.name.endswith("Aug") for item in data.items)
    (voc / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("e\na\n")
    assert ids(module(voc, "train_aug")) == ["e", "a"]


def test_aug_is_a_split_of_its_own(voc: Path) -> None:
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "aug.txt").write_text("d\ne\n")
    assert ids(module(voc, "train_aug")) == ["a", "b", "d", "e"]
    (lists / "trainaug.txt").write_text("a\nb\nd\ne\n")
    assert ids(module(voc, "aug")) == ["d", "e"]
    (lists / "train_aug.txt").write_text("a\nd\n")
    assert ids(module(voc, "trainaug")) == ["a", "b", "d", "e"]


def test_train_is_scored_on_voc_truth_and_train_aug_on_the_augmented(voc: Path) -> None:
    for split, values in (("train", [0, 3, 255]), ("train_aug", [0, 3, 15, 255])):
        sample = read_all(module(voc, split), test=True)[0]
        assert isinstance(sample, Sample)
        assert sample.truth is not None
        assert sample.truth.unique().tolist() == values


def test_list_files(voc: Path, tmp_path: Path) -> None:
    listed = tmp_path / "some.txt"
    listed.write_text("/JPEGImages/d.jpg /SegmentationClassAug/d.png\n\nc\n")
    data = module(voc, str(listed))
    assert [(item.image_id, item.truth) for item in data.items] == [
        ("d", voc / "SegmentationClassAug" / "d.png"),
        ("c", voc / "SegmentationClass" / "c.png"),
    ]
    assert all(isinstance(sample, Sample) for sample in read_all(data, test=True))


@pytest.mark.parametrize(
    ("line", "image_id", "image", "truth"),
    [
        ("2007_000032", "2007_000032", None, None),
        ("COCO_train2014_000000000009 45 49", "COCO_train2014_000000000009", None, None),
        ("x.jpg", "x", None, None),
        ("v1.5_photo", "v1.5_photo", None, None),
        ("/JPEGImages/x.jpg /S/x.png", "x", "JPEGImages/x.jpg", "S/x.png"),
        ("JPEGImages/x.jpg", "x", "JPEGImages/x.jpg", None),
        ("../x.jpg", "../x.jpg", None, None),
    ],
)
def test_lines(line: str, image_id: str, image: str | None, truth: str | None) -> None:
    parsed = parse_line(line)
    assert (parsed.image_id, parsed.image, parsed.truth) == (image_id, image, truth)


def test_labels_from_annotations(voc: Path) -> None:
    (voc / "Annotations" / "a.xml").write_text(
        "<annotation><object><name>bird</name></object></annotation>"
    )
    sample = read_all(module(voc, labels="annotations"))[0]
    assert isinstance(sample, Sample)
    assert sample.seed.class_ids == (3,)


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<annotation><object><name>dragon</name></object></annotation>", "dragon"),
        ("<annotation/>", "no class"),
        ("<annotation>", "no XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "entities"),
        (None, "no annotation"),
    ],
)
def test_bad_annotations_fail_the_item(xml: str | None, message: str, voc: Path) -> None:
    path = voc / "Annotations" / "a.xml"
    path.unlink()
    if xml is not None:
        path.write_text(xml)
    failed, fine = read_all(module(voc, labels="annotations"))
    assert isinstance(failed, FailedSample)
    assert "a.xml" in failed.error
    assert message in failed.error
    assert isinstance(fine, Sample)


@pytest.mark.parametrize("kind", ["ids", "names", "npy", "irn npy"])
def test_labels_from_a_file(kind: str, voc: Path, tmp_path: Path) -> None:
    path = tmp_path / ("labels.npy" if "npy" in kind else "labels.txt")
    hot = np.zeros(20, np.float32)
    hot[14] = 1
    match kind:
        case "ids":
            path.write_text("a 14\nb 14\n")
        case "names":
            path.write_text("a person\nb People\n")
        case "npy":
            np.save(path, {"a": hot, "b": hot}, allow_pickle=True)  # type: ignore[arg-type]
        case _:  # ids as numbers
            for old, new in (("a", "2007_000032"), ("b", "2007_000039")):
                (voc / "JPEGImages" / f"{old}.jpg").rename(voc / "JPEGImages" / f"{new}.jpg")
                (seeds_of(voc) / f"{old}.npy").rename(seeds_of(voc) / f"{new}.npy")
            (voc / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n2007_000039")
            np.save(path, {2007000032: hot, 2007000039: hot}, allow_pickle=True)  # type: ignore[arg-type]
    for sample in read_all(module(voc, labels=str(path))):
        assert isinstance(sample, Sample)
        assert sample.seed.class_ids == (15,)


def test_only_coco_names_are_looked_up_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("1 3\n000000000009 14\n")
    labels = FileLabels(path, read_class_list("voc"))
    assert labels.read("1") == labels.read("COCO_train2014_000000000001") == (4,)
    assert labels.read("COCO_train2014_000000000009") == (15,)
    for other in ("train_1", "a1", "2007_1"):
        with pytest.raises(BadItemError, match=f"no labels for image {other}"):
            labels.read(other)


def test_labels_without_seeds_give_empty_maps(voc: Path) -> None:
    """For models that make seeds."""
    sample = read_all(module(voc, seeds=None, labels="annotations"))[0]
    assert isinstance(sample, Sample)
    assert sample.seed.class_ids == (3, 15)
    assert sample.seed.scores.shape == (2, 12, 17)
    assert not sample.seed.scores.any()


def test_other_class_names(voc: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("# scenes\n" + "".join(f"c{n} | class {n} | other {n}\n" for n in range(15)))
    sample = read_all(module(voc, class_names=str(names)))[0]
    assert isinstance(sample, Sample)
    assert sample.class_names == ("class 2", "class 14")
