"""The data modules on fake trees: what is listed, read, refused, and when."""

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch

from datamodules import (
    ADE20KDataModule,
    COCODataModule,
    ContextDataModule,
    FolderDataModule,
    NightCityDataModule,
    SeedDataModule,
    VOCDataModule,
)
from datamodules.classes import BUNDLED, read_class_list
from datamodules.items import check_id, parse_line
from datamodules.sampling import ProcessSampler
from g4seg_pl.types import BadItemError, ConfigurationError, FailedSample, Sample

Maker = Callable[..., Path]


def ids(data: SeedDataModule) -> list[str]:
    return [item.image_id for item in data.items]


def read_all(data: SeedDataModule, *, test: bool = False) -> list[Sample | FailedSample]:
    loader = data.test_dataloader() if test else data.predict_dataloader()
    return [sample for batch in loader for sample in batch]


def seeds_of(voc: Path) -> Path:
    return voc.parent.parent / "cam_out"


def module(voc: Path, split: str = "train", **options: object) -> VOCDataModule:
    options = {"seeds": seeds_of(voc), "num_workers": 0} | options
    return VOCDataModule(voc, split=split, **options)  # type: ignore[arg-type]


# VOC ----------------------------------------------------------------------------------------------


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


# Bad items ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("image_id", ["", "..", "a/../b", "/a", "a/b", "a\\b", "C:x", "a\0", "~"])
def test_unsafe_ids(image_id: str) -> None:
    with pytest.raises(BadItemError, match="image id"):
        check_id(image_id)


def test_missing_truth_fails_the_item_in_test(voc: Path) -> None:
    (voc / "SegmentationClass" / "a.png").unlink()
    failed, fine = read_all(module(voc), test=True)
    assert isinstance(failed, FailedSample)
    assert "a.png" in failed.error
    assert isinstance(fine, Sample)


# Configuration ------------------------------------------------------------------------------------


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


# Shards, exclusion, workers -----------------------------------------------------------------------


def test_shards_are_a_partition(voc: Path) -> None:
    whole = ids(module(voc, "train_aug"))
    shards = [ids(module(voc, "train_aug", shard=f"{i}/3")) for i in (1, 2, 3)]
    assert sorted(itertools.chain(*shards)) == whole
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_exclusion_comes_after_sharding(voc: Path) -> None:
    data = module(voc, "train_aug", shard="1/2")
    data.setup("predict")
    assert ids(data) == ["a", "d"]
    data.exclude(["a", "not listed"])
    assert ids(data) == ["d"]
    data.exclude(["a", "d"])
    assert ids(data) == []
    assert read_all(data) == []


def test_exclusion_replaces_that_of_an_earlier_run(voc: Path) -> None:
    data = module(voc, "train_aug", shard="1/2")
    data.exclude(["a"])
    data.exclude(["d"])
    assert ids(data) == ["a"]
    data.exclude(())
    assert ids(data) == ["a", "d"]


@pytest.mark.parametrize(("items", "processes"), [(5, 2), (2, 3), (0, 2)])
def test_processes_share_the_items_without_repeating_any(items: int, processes: int) -> None:
    samplers = [ProcessSampler(range(items), processes, rank) for rank in range(processes)]
    parts = [list(sampler) for sampler in samplers]
    assert sorted(itertools.chain(*parts)) == list(range(items))
    assert [len(sampler) for sampler in samplers] == [len(part) for part in parts]


def test_workers_read_the_same(voc: Path) -> None:
    alone = read_all(module(voc, "train_aug"))
    data = module(voc, "train_aug", num_workers=2, batch_size=2)
    for one, other in zip(alone, read_all(data), strict=True):
        assert isinstance(one, Sample)
        assert isinstance(other, Sample)
        assert one.image_id == other.image_id
        torch.testing.assert_close(one.image, other.image, rtol=0, atol=0)
        torch.testing.assert_close(one.seed.scores, other.seed.scores, rtol=0, atol=0)
    pickle.loads(pickle.dumps(data.predict_dataloader().dataset))  # for workers that are spawned


class Collects(lightning.LightningModule):
    """Keeps what the trainer hands to `predict_step`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def predict_step(self, batch: list[Sample | FailedSample], batch_idx: int) -> list[str]:
        self.seen += [sample.image_id for sample in batch]
        return self.seen


# Lightning 2.6 asks torch's pytree in a way that torch 2.15 deprecates.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_hands_batches_over_untouched(voc: Path, tmp_path: Path) -> None:
    model = Collects()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = module(voc, "train_aug", batch_size=3)
    trainer.predict(model, data, return_predictions=False)
    assert model.seen == ["a", "b", "d", "e"]


# The other layouts --------------------------------------------------------------------------------


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
    save_seed(tmp_path / "seeds" / f"{name}.npy", [1, 80])
    file = "000000000009.png" if suffix == "number" else f"{name}{suffix}"
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
    assert sample.class_names == ("television", "wood")


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


# Class lists --------------------------------------------------------------------------------------


CLASS_COUNTS = {
    "voc": 20,
    "voc_clip_es": 20,
    "coco": 80,
    "coco_clip_es": 80,
    "context": 59,
    "context459": 459,
    "ade20k": 150,
    "nightcity": 19,
    "scenes": 12,
}


@pytest.mark.parametrize(("name", "count"), CLASS_COUNTS.items())
def test_bundled_lists(name: str, count: int) -> None:
    classes = read_class_list(name)
    assert len(classes) == len(classes.names) == len(classes.prompts) == count
    for class_id, word in enumerate(classes.names, start=1):
        assert classes.find(word.upper()) == class_id
        assert classes.find(classes.prompt(class_id)) == class_id


def test_every_bundled_list_is_tested() -> None:
    assert {path.stem for path in BUNDLED.glob("*.txt")} == set(CLASS_COUNTS)


def test_synonyms() -> None:
    voc = read_class_list("voc")
    assert voc.prompt(20) == "television"
    assert voc.find("TV_Monitor") == voc.find("screen") == 20
    assert voc.find("dragon") is None


def test_a_list_with_a_name_twice(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    for content in ("cat\ncat\n", "# none\n", "|cat\n"):
        path.write_text(content)
        with pytest.raises(ConfigurationError, match=r"names\.txt"):
            read_class_list(path)
