"""The data sets besides VOC, on fake trees."""

from collections.abc import Callable
from pathlib import Path

import pytest
from data_reading import read_all

from datamodules import (
    ADE20KDataModule,
    COCODataModule,
    ContextDataModule,
    FolderDataModule,
    NightCityDataModule,
    PseudoLabelDataModule,
)
from g4seg_pl.types import ConfigurationError, FailedSample, Sample

Maker = Callable[..., Path]


def test_folder(tmp_path: Path, save_image: Maker, save_seed: Maker, save_label: Maker) -> None:
    names = tmp_path / "names.txt"
    names.write_text("zebra disc\nbrick block\n")
    for name in ("x.png", "y.JPG"):
        save_image(tmp_path / "images" / name)
        save_seed(tmp_path / "seeds" / f"{name[0]}.npy", [2])
        save_label(tmp_path / "truth" / f"{name[0]}.png", [0, 2])
    (tmp_path / "images" / "notes.txt").write_text("")
    data = FolderDataModule(
        tmp_path / "images",
        tmp_path / "seeds",
        names,
        truth=tmp_path / "truth",
        num_workers=0,
    )
    samples = read_all(data, test=True)
    assert [s.image_id for s in samples] == ["x", "y"]
    assert all(isinstance(s, Sample) and s.class_names == ("brick block",) for s in samples)
    (tmp_path / "seeds" / "y.npy").rename(tmp_path / "seeds" / "y.NPY")
    listed = tmp_path / "list.txt"
    listed.write_text("y\nx.png\n")
    data = FolderDataModule(
        tmp_path / "images", tmp_path / "seeds", names, split=str(listed), num_workers=0
    )
    assert all(isinstance(sample, Sample) for sample in read_all(data))
    assert [item.image.name for item in data.items] == ["y.JPG", "x.png"]
    save_image(tmp_path / "images" / "x.jpg")
    with pytest.raises(ConfigurationError, match="listed twice"):
        FolderDataModule(tmp_path / "images", tmp_path / "seeds", names).setup()
    with pytest.raises(ConfigurationError, match="class_names: None"):
        FolderDataModule(tmp_path / "images", tmp_path / "seeds").setup()
    with pytest.raises(ConfigurationError, match="root: no image"):
        FolderDataModule(tmp_path / "seeds", tmp_path / "seeds", names).setup()


COCO_LAYOUTS = [
    ("JPEGImages/train2014", "COCO_train2014_000000000009", "SegmentationClass/train2014", ".png"),
    ("JPEGImages/train2014", "COCO_train2014_000000000009", "SegmentationClass", ".png"),
    ("train2014", "COCO_train2014_000000000009", "coco_seg_anno", "number"),
    ("images/train2014", "000000000009", "annotations/train2014", "_instanceTrainIds.png"),
]


@pytest.mark.parametrize(("images", "name", "truth", "suffix"), COCO_LAYOUTS)
def test_coco(
    images: str,
    name: str,
    truth: str,
    suffix: str,
    tmp_path: Path,
    save_image: Maker,
    save_seed: Maker,
    save_label: Maker,
) -> None:
    save_image(tmp_path / images / f"{name}.jpg")
    numbered = suffix == "number"
    seed = "000000000009" if numbered else name
    save_seed(tmp_path / "seeds" / f"{seed}.npy", [1, 80])
    file = "000000000009.png" if numbered else f"{name}{suffix}"
    save_label(tmp_path / truth / file, [0, 90, 13, 255])
    options = {"split": "train2014", "num_workers": 0}
    wide = COCODataModule(tmp_path, tmp_path / "seeds", truth_ids="coco91", **options)  # type: ignore[arg-type]
    sample = read_all(wide, test=True)[0]
    assert isinstance(sample, Sample), sample
    assert sample.truth is not None
    assert sample.truth.unique().tolist() == [0, 12, 80, 255]
    assert sample.class_names == ("person", "toothbrush")
    narrow = COCODataModule(tmp_path, tmp_path / "seeds", **options)  # type: ignore[arg-type]
    failed = read_all(narrow, test=True)[0]
    assert isinstance(failed, FailedSample)
    assert "[90]" in failed.error


def test_a_list_of_training_images_says_nothing_of_validation(
    tmp_path: Path, save_image: Maker, save_label: Maker
) -> None:
    names = ["COCO_train2014_000000000009", "COCO_train2014_000000000025"]
    for split, each in (("train2014", names), ("val2014", ["COCO_val2014_000000000042"])):
        for name in each:
            save_image(tmp_path / split / f"{name}.jpg")
            save_label(tmp_path / "SegmentationClass" / f"{name}.png", [0, 1])
    # As CLIP-ES's coco14/train.txt: an id and its 0-based classes a line.
    (tmp_path / "train.txt").write_text(f"{names[1]} 0 48\n")
    images = COCODataModule(tmp_path, split="train2014", list_file=tmp_path / "train.txt")
    data = PseudoLabelDataModule(images, val="val2014", num_workers=0)
    data.setup("fit")
    assert [item.image_id for item in data.training_images.items] == names[1:]
    loader = data.val_dataloader()
    assert [item.image_id for item in loader.dataset.items] == ["COCO_val2014_000000000042"]
    assert images.list_file is not None


def test_coco_without_images(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"split: found none.*JPEGImages/val2017"):
        COCODataModule(tmp_path, tmp_path).setup()
    (tmp_path / "val2017").mkdir()
    with pytest.raises(ConfigurationError, match=r"no \.jpg"):
        COCODataModule(tmp_path, tmp_path).setup()


@pytest.mark.parametrize(("background", "values"), [(True, [0, 59, 255]), (False, [59, 255])])
def test_context(
    background: bool,
    values: list[int],
    tmp_path: Path,
    save_image: Maker,
    save_seed: Maker,
    save_label: Maker,
) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2010"
    save_image(root / "JPEGImages" / "a.jpg")
    save_label(root / "SegmentationClassContext" / "a.png", [0, 59, 255])
    save_seed(tmp_path / "seeds" / "a.npy", [20, 59])
    (root / "ImageSets" / "SegmentationContext").mkdir(parents=True)
    (root / "ImageSets" / "SegmentationContext" / "val.txt").write_text("a\n")
    data = ContextDataModule(tmp_path, tmp_path / "seeds", background=background, num_workers=0)
    sample = read_all(data, test=True)[0]
    assert isinstance(sample, Sample), sample
    assert sample.truth is not None
    assert sample.truth.unique().tolist() == values
    assert sample.class_names == ("cow", "wood")


def test_ade20k(tmp_path: Path, save_image: Maker, save_seed: Maker, save_label: Maker) -> None:
    root = tmp_path / "ade" / "ADEChallengeData2016"
    name = "ADE_val_00000001"
    save_image(root / "images" / "validation" / f"{name}.jpg")
    save_label(root / "annotations" / "validation" / f"{name}.png", [0, 1, 150])
    save_seed(tmp_path / "seeds" / f"{name}.npy", [1, 150])
    sample = read_all(ADE20KDataModule(tmp_path, tmp_path / "seeds", num_workers=0), test=True)[0]
    assert isinstance(sample, Sample), sample
    assert sample.truth is not None
    assert sample.truth.unique().tolist() == [1, 150, 255]
    assert sample.class_names == ("wall", "flag")


@pytest.mark.parametrize("folder", ["lbl", "label"])
def test_nightcity(
    folder: str, tmp_path: Path, save_image: Maker, save_seed: Maker, save_label: Maker
) -> None:
    root = tmp_path / "nightcity-fine"
    save_image(root / "val" / "img" / "a.png")
    save_label(root / "val" / folder / "a_trainIds.png", [0, 18, 255])
    save_seed(tmp_path / "seeds" / "a.npy", [1, 19])
    data = NightCityDataModule(tmp_path, tmp_path / "seeds", num_workers=0)
    sample = read_all(data, test=True)[0]
    assert isinstance(sample, Sample), sample
    assert sample.truth is not None
    assert sample.truth.unique().tolist() == [1, 19, 255]
    assert sample.class_names == ("road", "bicycle")
