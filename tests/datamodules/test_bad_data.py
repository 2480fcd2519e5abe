"""What the data modules refuse, and when: items by name, configurations before a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from data_reading import module, read_all, seeds_of

from datamodules import (
    FolderDataModule,
    VOCDataModule,
)
from datamodules.items import check_id
from g4seg_pl.types import BadItemError, ConfigurationError, FailedSample, Sample

Maker = Callable[..., Path]


def test_bad_items_fail_by_name_and_the_others_are_read(
    voc: Path, save_image: Maker, save_seed: Maker
) -> None:
    lists, seeds = voc / "ImageSets" / "Segmentation", seeds_of(voc)
    (lists / "bad.txt").write_text(
        "a\n../a\n/etc/passwd\nno_image\nno_seed\ncut\nsmall\nunknown\n/JPEGImages/../a.jpg\nb\n"
    )
    for name in ("no_seed", "cut", "small", "unknown"):
        save_image(voc / "JPEGImages" / f"{name}.jpg")
    cut = voc / "JPEGImages" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    for name, class_ids, size in (
        ("cut", [1], (12, 17)),
        ("small", [1], (6, 8)),
        ("unknown", [21], (12, 17)),
        ("no_image", [1], (12, 17)),
    ):
        save_seed(seeds / f"{name}.npy", class_ids, size)
    samples = read_all(module(voc, "bad", batch_size=3))
    assert [type(sample) for sample in samples] == [Sample, *[FailedSample] * 8, Sample]
    for sample in samples[1:-1]:
        assert isinstance(sample, FailedSample)
        assert sample.image_id in sample.error


@pytest.mark.parametrize(
    "image_id", ["", "..", "a/../b", "/a", "a/b", "a\\b", "C:x", "a\0", "~", "猫" * 84]
)
def test_unsafe_ids(image_id: str) -> None:
    with pytest.raises(BadItemError, match="image id"):
        check_id(image_id)


def test_missing_truth_fails_the_item_in_test(voc: Path) -> None:
    (voc / "SegmentationClass" / "a.png").unlink()
    failed, fine = read_all(module(voc), test=True)
    assert isinstance(failed, FailedSample)
    assert "a.png" in failed.error
    assert isinstance(fine, Sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": "nowhere"}, "seeds: no folder nowhere"),
        ({"seeds": None}, "seeds: None given"),
        ({"split": "trainval"}, "split: 'trainval' is neither"),
        ({"class_names": "no_such_list"}, "class_names: no file no_such_list.*voc"),
        ({"labels": "no_such_file"}, "labels: no file no_such_file"),
        ({"shard": "1/0"}, "shard: '1/0'"),
        ({"shard": "3/2"}, "shard: '3/2'"),
        ({"shard": "half"}, "shard: 'half'"),
        ({"batch_size": 0}, "batch_size is 0: give 1 or more"),
        ({"num_workers": -1}, "num_workers is -1: give 0 or more"),
    ],
)
def test_wrong_configurations_stop_at_setup(
    options: dict[str, object], message: str, voc: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        module(voc, **options).setup("predict")  # type: ignore[arg-type]


def test_a_missing_root_names_every_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"root: no folder JPEGImages.*VOCdevkit/VOC2012"):
        VOCDataModule(tmp_path, tmp_path).setup()


def test_train_aug_that_cannot_be_derived(voc: Path) -> None:
    (voc / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(ConfigurationError, match=r"train_aug\.txt.*val\.txt"):
        module(voc, "train_aug").setup()


def test_ids_listed_twice_or_empty(voc: Path) -> None:
    listed = voc / "ImageSets" / "Segmentation" / "train.txt"
    listed.write_text("a\nb\na\n")
    with pytest.raises(ConfigurationError, match=r"listed twice.*'a'"):
        module(voc).setup()
    listed.write_text("\n")
    with pytest.raises(ConfigurationError, match="empty"):
        module(voc).setup()


def test_no_truth_at_all(voc: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("a\n")
    data = FolderDataModule(
        voc / "JPEGImages", seeds_of(voc), "voc", split=str(listed), num_workers=0
    )
    assert isinstance(read_all(data)[0], Sample)
    with pytest.raises(ConfigurationError, match="no ground truth"):
        data.test_dataloader()
