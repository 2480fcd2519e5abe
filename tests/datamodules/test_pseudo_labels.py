"""Training data: what comes out, what is checked, and that order and draws depend on seeds only."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_voc import CLASSES, IDS, SIZES
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from segmentation.trees import data_module, label_file, write_tree

from datamodules import FolderDataModule, PseudoLabelDataModule, VOCDataModule
from g4seg_pl.segmentation.augmentation import Augmentation
from g4seg_pl.segmentation.normalisation import denormalise
from g4seg_pl.segmentation.sampling import EpochSampler
from g4seg_pl.types import BadItemError, ConfigurationError

WHOLE = Augmentation(crop_size=80, scale=(1, 1), flip=0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_tree(tmp_path)
    return tmp_path


def test_batch_is_the_dictionary_that_others_take(root: Path) -> None:
    data = data_module(root)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "mask"}
    assert batch["image"].shape == (2, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert batch["mask"].shape == (2, 32, 32)
    assert batch["mask"].dtype == torch.int64
    assert len(data.label_names) == 21


def test_without_augmentation_files_come_out_as_they_are(root: Path) -> None:
    data = data_module(root, augmentation=WHOLE, soft=True)
    data.setup("fit")
    for index, (image_id, (height, width)) in enumerate(zip(IDS, SIZES, strict=True)):
        item = data.training_images[index]
        inside = item["mask"] != 255
        assert int(inside.sum()) == height * width
        expected = label_file(root / "refined" / "masks" / f"{image_id}.png")
        assert torch.equal(item["mask"][inside], torch.from_numpy(expected).long().ravel())
        path = root / "VOCdevkit/VOC2012/JPEGImages" / f"{image_id}.jpg"
        pixels = denormalise(item["image"]).permute(1, 2, 0)[inside]
        assert np.array_equal(pixels.numpy(), np.array(Image.open(path)).reshape(-1, 3))
        # The most probable label of the soft map is the mask, and padding has no probability.
        assert torch.equal(item["soft"].argmax(0)[inside], item["mask"][inside])
        assert torch.allclose(item["soft"].sum(0), inside.float(), atol=1e-3)


def test_workers_send_the_planes_of_the_images_own_labels(root: Path) -> None:
    data = data_module(root, soft=True, batch_size=3)
    data.setup("fit")
    loader = data.train_dataloader()
    (batch,) = loader
    assert batch["soft_planes"].shape == (3, 1 + max(map(len, CLASSES)), 32, 32)
    moved = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert set(moved) == {"image", "mask", "soft"}
    items = [data.training_images[draw] for draw in loader.sampler]
    for name, tensor in moved.items():
        assert torch.equal(tensor, torch.stack([item[name] for item in items]))


def test_batches_of_combined_loaders_have_soft_maps_too(root: Path) -> None:
    data = data_module(root, soft=True)
    data.setup("fit")
    plain = data.val_dataloader()
    loaders = {"a": data.train_dataloader(), "b": [data.train_dataloader(), plain]}
    batch, _, _ = next(iter(CombinedLoader(loaders, "min_size")))
    assert "soft" not in batch["a"]
    moved = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert set(moved) == {"a", "b"}
    for each in (moved["a"], moved["b"][0]):
        assert set(each) == {"image", "mask", "soft"}
        assert each["soft"].shape == (2, 21, 32, 32)
    assert set(moved["b"][1]) == {"image", "mask", "image_id"}


def test_missing_masks_are_named(root: Path) -> None:
    (root / "refined" / "masks" / f"{IDS[1]}.png").unlink()
    with pytest.raises(ConfigurationError, match=f"1 of 3 .*'train'.*made of.*{IDS[1]}"):
        data_module(root).setup("fit")


def test_many_missing_masks_are_counted(root: Path) -> None:
    listing = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt"
    extra = [f"2008_{number:06d}" for number in range(40)]
    listing.write_text("\n".join([*IDS, *extra]))
    source = VOCDataModule(root, split="train_aug")
    data = PseudoLabelDataModule(source, labels=root / "refined")
    with pytest.raises(ConfigurationError, match=r"40 of 43 .*made of split 'train'.*30 more"):
        data.setup("fit")


def test_missing_soft_maps_are_named(root: Path) -> None:
    (root / "refined" / "soft" / f"{IDS[2]}.npz").unlink()
    data_module(root).setup("fit")
    with pytest.raises(ConfigurationError, match=f"no soft map.*{IDS[2]}.*writer.soft"):
        data_module(root, soft=True).setup("fit")


def test_masks_of_another_class_list_are_refused(root: Path) -> None:
    record = root / "refined" / "run.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"class_names": ["cat", "dog"]}))
    with pytest.raises(ConfigurationError, match=r"class 1 is 'cat' by .* and 'aeroplane' here"):
        data_module(root).setup("fit")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": Path("nowhere")}, "nowhere"),
        ({"labels": None, "soft": True}, "data.soft"),
        ({"val": "held_out"}, "held_out"),
    ],
)
def test_bad_settings_are_named(root: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        data_module(root, **changes).setup("fit")


def test_validation_without_truth_is_refused(root: Path) -> None:
    (root / "VOCdevkit/VOC2012/SegmentationClass" / f"{IDS[0]}.png").unlink()
    with pytest.raises(ConfigurationError, match=f"data.val: 1 of 3.*{IDS[0]}"):
        data_module(root).setup("fit")


def test_mask_of_another_size_is_refused(root: Path) -> None:
    path = root / "refined" / "masks" / f"{IDS[0]}.png"
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(path)
    data = data_module(root)
    data.setup("fit")
    with pytest.raises(BadItemError, match=r"8x9.*40x52"):
        data.training_images[0]


def test_ground_truth_and_bare_folders_serve_as_labels(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = root / "VOCdevkit/VOC2012/SegmentationClass"
    for labels in (None, truth):
        data = data_module(root, labels=labels, augmentation=WHOLE)
        data.setup("fit")
        mask = data.training_images[0]["mask"]
        counts = np.bincount(label_file(truth / f"{IDS[0]}.png").ravel(), minlength=256)
        assert int((mask == 12).sum()) == counts[12] > 0
        told = "training on the ground truth" in capsys.readouterr().err
        assert told == (labels is None), "nobody trains on the truth unawares"


def test_validation_images_keep_their_size(root: Path) -> None:
    data = data_module(root)
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert [tuple(batch["image"].shape[2:]) for batch in batches] == list(SIZES)
    assert [batch["image_id"] for batch in batches] == [[image_id] for image_id in IDS]
    assert all(batch["mask"].max() == 255 for batch in batches)


def test_sizes_cannot_be_mixed_in_a_batch(root: Path) -> None:
    data = data_module(root, val_batch_size=2)
    data.setup("fit")
    with pytest.raises(BadItemError, match="val_batch_size"):
        next(iter(data.val_dataloader()))


def test_validation_data_may_lie_elsewhere(root: Path) -> None:
    voc = root / "VOCdevkit/VOC2012"
    other = FolderDataModule(voc / "JPEGImages", class_names="voc", truth=voc / "SegmentationClass")
    data = data_module(root, val=other)
    data.setup("fit")
    assert len(data.val_dataloader()) == 3
    assert data_module(root, val=None).val_dataloader() == []


def test_a_plain_folder_has_no_split_of_the_default_name(root: Path) -> None:
    voc = root / "VOCdevkit" / "VOC2012"
    images = FolderDataModule(voc / "JPEGImages", class_names="voc")
    data = PseudoLabelDataModule(images, root / "refined", num_workers=0)
    with pytest.raises(ConfigurationError, match=r"^data.val: 'val' is no list file.* val=None"):
        data.setup("fit")
    alone = PseudoLabelDataModule(images, root / "refined", val=None, num_workers=0)
    alone.setup("fit")
    assert len(alone.training_images) == len(IDS)
    (root / "few.txt").write_text(f"{IDS[0]}\n")
    listed = PseudoLabelDataModule(images, root / "refined", val=str(root / "few.txt"))
    assert [item.image_id for item in listed.items] == list(IDS[:1])


def test_finished_images_are_left_out_of_predict(root: Path) -> None:
    data = data_module(root)
    data.exclude([IDS[0]])
    assert [item.image_id for item in data.items] == list(IDS[1:])
    assert "mask" not in next(iter(data.predict_dataloader()))


def epoch(root: Path, number: int, workers: int, seed: int = 0) -> torch.Tensor:
    """All images of an epoch in their order."""
    data = data_module(root, num_workers=workers, batch_size=1, seed=seed)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return torch.cat([batch["image"] for batch in loader])


@pytest.mark.filterwarnings("ignore:.*will create 2 worker processes")  # on a single core
def test_draws_depend_on_seed_and_epoch_only(root: Path) -> None:
    torch.manual_seed(1)
    first = epoch(root, 0, workers=0)
    torch.manual_seed(2)
    np.random.seed(3)
    assert torch.equal(first, epoch(root, 0, workers=2))
    assert not torch.equal(first, epoch(root, 1, workers=0))
    assert not torch.equal(first, epoch(root, 0, workers=0, seed=1))


def test_processes_share_an_epoch() -> None:
    shares = [
        [draw.place for draw in EpochSampler(range(10), 3, lambda: 7, processes=3, rank=rank)]
        for rank in range(3)
    ]
    assert [len(share) for share in shares] == [4, 4, 4]
    assert {place for share in shares for place in share} == set(range(10))
    alone = list(EpochSampler(range(10), 3, lambda: 7))
    assert sorted(draw.place for draw in alone) == list(range(10))
    assert len({draw.seed for draw in alone}) == 10
    later = list(EpochSampler(range(10), 3, lambda: 8))
    assert [draw.place for draw in later] != [draw.place for draw in alone]
