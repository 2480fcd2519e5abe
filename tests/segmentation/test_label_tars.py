"""Training and evaluation on tars: what the folder form gives, and bad tars are named."""

import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_voc import CLASSES, SIZES
from segmentation.trees import data_module, write_tree

from datamodules.archives import TarArchive
from datamodules.places import open_place
from datamodules.seed_files import read_seed
from g4seg_pl.callbacks.output_folder import OutputFolder
from g4seg_pl.callbacks.tar_folder import TarFolder
from g4seg_pl.callbacks.tar_samples import id_of
from g4seg_pl.callbacks.tar_writer import TarSize
from g4seg_pl.evaluation.evaluate import evaluate
from g4seg_pl.segmentation.augmentation import Augmentation
from g4seg_pl.segmentation.label_folder import LabelFolder
from g4seg_pl.types import BadItemError, ConfigurationError, RefinedMask

IDS = ("first.image", "second", "third.of.3")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with the same masks in files, `refined`, and in tars of two images, `tars`."""
    write_tree(tmp_path, IDS)
    tars = TarFolder(tmp_path / "tars", "npz", TarSize(images=2))
    tars.make()
    (tmp_path / "tars" / "run.json").write_text((tmp_path / "refined" / "run.json").read_text())
    sink = tars.sink("rank0")
    for index, image_id in enumerate(IDS):
        sink.save(mask(image_id, index), {"id": image_id})
        OutputFolder(tmp_path / "refined", "npz").save(mask(image_id, index))
    sink.close()
    return tmp_path


def mask(image_id: str, index: int) -> RefinedMask:
    maps = torch.rand(len(CLASSES[index]), *SIZES[index], generator=torch.manual_seed(index))
    label = torch.tensor([0, *CLASSES[index]])[torch.cat([maps[:1] * 0 + 0.5, maps]).argmax(0)]
    return RefinedMask(image_id, CLASSES[index], maps, label.byte())


@pytest.mark.parametrize("below", ["", "masks"])
def test_batches_are_those_of_the_folder_form(root: Path, below: str) -> None:
    soft = below == ""  # run.json, which says how to read soft maps, lies above the masks
    batches: list[list[dict[str, Any]]] = []
    for labels in (root / "refined" / below, root / "tars" / below):
        data = data_module(root, labels=labels, soft=soft)
        data.setup("fit")
        cpu = torch.device("cpu")
        loaded = data.train_dataloader()
        batches.append([data.transfer_batch_to_device(batch, cpu, 0) for batch in loaded])
    for ours, theirs in zip(*batches, strict=True):
        assert set(ours) == set(theirs) == {"image", "mask", *(["soft"] if soft else [])}
        for name in ours:
            assert torch.equal(ours[name], theirs[name])


def test_workers_read_what_the_main_process_reads(root: Path) -> None:
    whole = Augmentation(crop_size=80, scale=(1, 1), flip=0)
    data = data_module(root, labels=root / "tars", augmentation=whole, num_workers=1)
    data.setup("fit")
    images = data.training_images
    here = [images[index]["mask"] for index in range(3)]  # opens the tars before the fork
    found = [each for batch in data.train_dataloader() for each in batch["mask"]]
    assert len(found) == 2  # the last batch is left out
    assert all(any(torch.equal(each, other) for other in here) for each in found)
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again[1]["mask"], here[1])


def test_evaluation_gives_the_same_scores(root: Path) -> None:
    truth = root / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    for name in ("refined", "tars"):
        evaluate(root / name, truth, 21, json=root / f"{name}.json")
    ours, theirs = (json.loads((root / f"{name}.json").read_text()) for name in ("tars", "refined"))
    assert ours == theirs
    assert ours["n_images"] == 3


def test_tars_without_manifests_are_read_too(root: Path) -> None:
    masks = root / "tars" / "masks"
    for path in sorted(masks.glob("*.jsonl")):
        path.unlink()
    for path in sorted(masks.glob("*.tar")):
        path.rename(masks / f"renamed {path.name}")
    data_module(root, labels=root / "tars", soft=True).setup("fit")


def test_tars_of_other_programs_are_read(root: Path) -> None:
    other = root / "other"
    other.mkdir()
    with tarfile.open(other / "labels.tar", "w") as tar:
        for path in (root / "refined" / "masks").iterdir():
            tar.add(path, f"some/folder/{path.stem.replace('.', '%2E')}.png")
    files = LabelFolder(other)
    for image_id in IDS:
        found = files.mask_file(image_id)
        assert found.read_bytes() == (root / "refined/masks" / f"{image_id}.png").read_bytes()
    assert not files.mask_file("nobody").is_file()


def test_soft_maps_are_seeds_of_a_next_run(root: Path) -> None:
    place = open_place("seeds", root / "tars" / "masks" / "*.tar")
    for index, image_id in enumerate(IDS):
        (file,) = place.find(image_id, (".npz",))
        seed = read_seed(file, SIZES[index], 20)
        assert seed.class_ids == CLASSES[index]
        expected = mask(image_id, index).foreground
        torch.testing.assert_close(seed.scores, expected, atol=1e-3, rtol=0)


def test_files_count_where_there_are_files(root: Path) -> None:
    shutil.copy(root / "tars" / "masks" / "rank0-000000.tar", root / "refined" / "masks")
    assert LabelFolder(root / "refined").mask_file("second").is_file()
    assert isinstance(LabelFolder(root / "refined").mask_file("second"), Path)


def test_missing_tar_is_named(root: Path) -> None:
    (root / "tars" / "masks" / "rank0-000001.tar").unlink()
    with pytest.raises(ConfigurationError, match=r"labels: .*rank0-000001\.tar is missing.*again"):
        data_module(root, labels=root / "tars").setup("fit")
    with pytest.raises(ConfigurationError, match=r"pred: .*rank0-000001\.tar is missing"):
        evaluate(root / "tars", root / "VOCdevkit/VOC2012/SegmentationClass", 21)


def test_tar_cut_short_is_named(root: Path) -> None:
    tar = root / "tars" / "masks" / "rank0-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-2000])
    with pytest.raises(ConfigurationError, match=r"rank0-000000\.tar was cut short"):
        LabelFolder(root / "tars")


def test_tar_cut_short_while_it_is_read_is_named(root: Path) -> None:
    files = LabelFolder(root / "tars")
    tar = root / "tars" / "masks" / "rank0-000001.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(BadItemError, match=r"rank0-000001\.tar \[third%2Eof%2E3\.png\]"):
        files.mask_file(IDS[2]).read_bytes()


def test_image_in_two_tars_is_refused(root: Path) -> None:
    masks = root / "tars" / "masks"
    shutil.copy(masks / "rank0-000000.tar", masks / "copy.tar")
    with pytest.raises(ConfigurationError, match=r"first\.image is there twice.*copy\.tar"):
        LabelFolder(root / "tars")


def test_missing_images_are_named_with_the_unfinished_tar(root: Path) -> None:
    masks = root / "tars" / "masks"
    (masks / "rank0-000001.jsonl").unlink()
    (masks / "rank0-000001.tar").rename(masks / ".rank0-000001.tar.tmp")
    with pytest.raises(
        ConfigurationError, match=r"1 of 3 .*third\.of\.3; \.rank0-000001\.tar\.tmp"
    ):
        data_module(root, labels=root / "tars").setup("fit")


def test_known_places_need_no_headers(root: Path) -> None:
    tar = root / "tars" / "masks" / "rank0-000000.tar"
    found = {name: TarArchive(tar).read(name) for name in TarArchive(tar).names()}
    assert {id_of(name.partition(".")[0]) for name in found} == set(IDS[:2])
    with tarfile.open(tar) as archive:
        places = {each.name: (each.offset_data, each.size) for each in archive}
    tar.write_bytes(b"\0" * 512 + tar.read_bytes()[512:])  # the first header is gone
    listed = TarArchive(tar, places)
    assert {name: listed.read(name) for name in listed.names()} == found
