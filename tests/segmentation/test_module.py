"""The module under a real Trainer: scores, groups, resuming, weight averages, precision."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from fake_voc import IDS
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
)
from PIL import Image
from segmentation.trees import data_module, label_file, write_tree
from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from torchmetrics.classification import MulticlassJaccardIndex

from g4seg_pl.callbacks.crf import CRFSettings
from g4seg_pl.callbacks.writer import MaskWriter
from g4seg_pl.evaluation.confusion import confusion_matrix, mean_iou
from g4seg_pl.segmentation.augmentation import Augmentation
from g4seg_pl.segmentation.label_folder import LabelFolder
from g4seg_pl.segmentation.losses import SoftCrossEntropy
from g4seg_pl.segmentation.module import SegmentationModule
from g4seg_pl.segmentation.pictures import colours
from g4seg_pl.segmentation.small_deeplab import SmallDeepLab
from g4seg_pl.segmentation.voc_server import VOCServerWriter
from g4seg_pl.types import ConfigurationError

CONFIGS = Path(__file__).parents[2] / "configs" / "train"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:.*outside the 'fit' stage"),
    # A resumed run writes where it wrote before; frozen batch norms are in eval mode on purpose.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]


class Dropping(nn.Module):
    """A tiny network whose training is random in itself."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
        )
        self.head = nn.Conv2d(8, 21, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits at half the size."""
        return self.head(self.backbone(images))


class Losses(Callback):
    """Keeps the loss of every step; may end the run as a kill would."""

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at = die_at
        self.values: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Record the step."""
        self.values[trainer.global_step] = float(outputs["loss"])
        if trainer.global_step == self.die_at:
            raise KilledError


class KilledError(Exception):
    """Stands for a kill."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_tree(tmp_path)
    return tmp_path


def test_soft_maps_that_are_still_planes_are_named(root: Path) -> None:
    data = data_module(root, soft=True)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(ConfigurationError, match=r"soft_planes.*transfer_batch_to_device"):
        small(loss=SoftCrossEntropy()).training_step(batch)


def small(**changes: Any) -> SegmentationModule:
    """A module around the tiny network, always the same one."""
    torch.manual_seed(0)
    rate = 0.05

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)

    return SegmentationModule(Dropping(), optimizer=optimizer, **changes)


def trainer(root: Path, *callbacks: Callback, **settings: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    keep = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": keep,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
        "max_epochs": 4,
    }
    return pl.Trainer(**(defaults | settings), callbacks=list(callbacks))


def last(root: Path) -> ModelCheckpoint:
    """Keeps the last epoch, as the command line does."""
    return ModelCheckpoint(
        root / "ckpt", "last", save_on_train_epoch_end=True, enable_version_counter=False
    )


@pytest.mark.parametrize(
    ("averaged", "workers", "bound"),
    [(False, 0, {}), (True, 0, {}), (False, 1, {"max_epochs": -1, "max_steps": 12})],
    ids=["plain", "averaged", "bounded by steps, with a worker"],
)
def test_killed_run_resumes_to_the_same_losses(
    root: Path, averaged: bool, workers: int, bound: dict[str, int]
) -> None:
    def data() -> pl.LightningDataModule:
        return data_module(root, batch_size=1, num_workers=workers)

    def extra() -> list[Callback]:
        return [EMAWeightAveraging(decay=0.5)] if averaged else []

    whole = Losses()
    first = small()
    trainer(root, whole, *extra(), **bound).fit(first, data())
    killed, resumed = Losses(die_at=8), Losses()
    with pytest.raises(KilledError):
        trainer(root, killed, last(root), *extra(), **bound).fit(small(), data())
    torch.manual_seed(123)
    again = small()
    path = str(root / "ckpt" / "last.ckpt")
    trainer(root, resumed, last(root), *extra(), **bound).fit(again, data(), ckpt_path=path)
    assert list(resumed.values) == list(range(7, 13))
    joined = {step: killed.values[step] for step in range(1, 7)} | resumed.values
    assert joined == pytest.approx(whole.values)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_best_checkpoint_is_that_of_the_best_miou(root: Path) -> None:
    keeper = ModelCheckpoint(root / "ckpt", "best", "val/miou", mode="max")
    run = trainer(root, keeper)
    run.fit(small(), data_module(root))
    assert keeper.best_model_score is not None
    scores = run.validate(small(), data_module(root), ckpt_path=keeper.best_model_path)
    assert scores[0]["val/miou"] == pytest.approx(float(keeper.best_model_score), abs=1e-3)


def test_a_run_stops_when_miou_no_longer_rises(root: Path) -> None:
    written = yaml.safe_load((CONFIGS / "early_stop.yaml").read_text())
    (added,) = written["trainer"]["callbacks+"]
    assert added["class_path"] == "lightning.pytorch.callbacks.EarlyStopping"
    # A learning rate of 0 and frozen statistics: every validation finds the same.
    torch.manual_seed(0)
    module = SegmentationModule(
        Dropping(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0),
        frozen_batch_norm=True,
        heads=["head"],
    )
    stop = EarlyStopping(**(added["init_args"] | {"patience": 2}))
    run = trainer(root, stop, max_epochs=9)
    run.fit(module, data_module(root))
    # The first is the best so far, two more do not improve on it.
    assert stop.stopped_epoch == 2
    assert run.current_epoch == 3


def test_a_run_that_may_stop_early_resumes(root: Path) -> None:
    def callbacks() -> list[Callback]:
        (added,) = yaml.safe_load((CONFIGS / "early_stop.yaml").read_text())["trainer"][
            "callbacks+"
        ]
        return [EarlyStopping(**added["init_args"]), last(root)]

    bound = {"max_epochs": -1, "max_steps": 12}
    with pytest.raises(KilledError):
        trainer(root, Losses(die_at=8), *callbacks(), **bound).fit(small(), data_module(root))
    run = trainer(root, *callbacks(), **bound)
    run.fit(small(), data_module(root), ckpt_path=str(root / "ckpt" / "last.ckpt"))
    assert run.global_step == 12


def test_miou_is_the_data_sets_confusion_matrix(root: Path) -> None:
    module = small()
    run = trainer(root)
    found = run.validate(module, data_module(root))[0]
    theirs = MulticlassJaccardIndex(21, average="none", ignore_index=255)
    counted = torch.zeros(21, dtype=torch.bool)
    data = data_module(root)
    with torch.no_grad():
        for batch in data.val_dataloader():
            labels = module.eval()(batch["image"]).argmax(1)
            theirs.update(labels, batch["mask"])
            valid = batch["mask"] != 255
            counted[labels[valid]] = counted[batch["mask"][valid]] = True
    per_class = theirs.compute()
    assert found["val/miou"] == pytest.approx(100 * float(per_class[counted].mean()), abs=1e-3)
    assert found["val/iou/dog"] == pytest.approx(100 * float(per_class[12]), abs=1e-3)
    assert "val/iou/sheep" not in found or counted[17]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_get_as_many_pictures_and_count_each_once(root: Path, processes: int) -> None:
    data = data_module(root)
    data.trainer = SimpleNamespace(world_size=processes, global_rank=0)  # type: ignore[assignment]
    pictures = data.val_dataloader().dataset
    counted: list[str] = []
    for rank in range(processes):
        # What Lightning puts in for several processes.
        sampler = DistributedSampler(pictures, processes, rank, shuffle=False)
        items = [pictures[index] for index in sampler]
        assert len(items) == math.ceil(len(pictures.items) / processes)
        counted += [item["image_id"] for item in items if (item["mask"] != 255).any()]
    assert sorted(counted) == sorted(item.image_id for item in pictures.items)


def test_head_learns_ten_times_as_fast(root: Path) -> None:
    class Rates(Callback):
        seen: list[list[float]]

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            groups = trainer.optimizers[0].param_groups
            self.seen.append([group["lr"] for group in groups])

    rates = Rates()
    rates.seen = []
    trainer(root, rates).fit(small(power=0.9), data_module(root, batch_size=1))
    steps = np.arange(12)
    backbone = 0.05 * (1 - steps / 12) ** 0.9
    assert np.allclose(rates.seen, np.stack([backbone, 10 * backbone], axis=1))


def test_frozen_batch_norm_stays_frozen_in_training(root: Path) -> None:
    module = small(frozen_batch_norm=True)
    before = module.network.backbone[1].running_mean.clone()  # type: ignore[union-attr, index]
    trainer(root, max_epochs=2).fit(module, data_module(root))
    norm = module.network.backbone[1]  # type: ignore[union-attr, index]
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(norm.weight, torch.ones(8))


def test_soft_targets_in_bfloat16(root: Path) -> None:
    losses = Losses()
    module = small(loss=SoftCrossEntropy(0.5))
    data = data_module(root, soft=True)
    trainer(root, losses, precision="bf16-mixed").fit(module, data)
    values = list(losses.values.values())
    assert all(np.isfinite(values))
    assert values[-1] < values[0]


def test_small_network_learns_three_pictures(root: Path) -> None:
    torch.manual_seed(0)

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    module = SegmentationModule(SmallDeepLab(21, 8), optimizer=optimizer, head_lr_factor=1)
    # Pictures that show their masks, for what is to be learnt from noise?
    voc = root / "VOCdevkit/VOC2012"
    for image_id in IDS:
        truth = label_file(voc / "SegmentationClass" / f"{image_id}.png")
        Image.fromarray(colours(truth)).save(voc / "JPEGImages" / f"{image_id}.jpg")
    whole = Augmentation(crop_size=72, scale=(1, 1), flip=0)
    data = data_module(root, labels=None, augmentation=whole, batch_size=3)
    run = trainer(root, max_epochs=40, check_val_every_n_epoch=40)
    run.fit(module, data)
    assert run.validate(module, data)[0]["val/miou"] > 70


def test_predictions_are_written_at_the_pictures_size(root: Path) -> None:
    module = small(scales=(1.0, 1.25), flip=True)
    callbacks = [MaskWriter(root / "out", soft="npz"), VOCServerWriter(root, "comp6", "val")]
    trainer(root, *callbacks).predict(module, data_module(root), return_predictions=False)
    folder = root / "results/VOC2012/Segmentation/comp6_val_cls"
    for image_id in IDS:
        label = label_file(root / "out" / "masks" / f"{image_id}.png")
        picture = label_file(root / "VOCdevkit/VOC2012/SegmentationClass" / f"{image_id}.png")
        assert label.shape == picture.shape
        assert np.array_equal(label, label_file(folder / f"{image_id}.png"))
    # The network's own predictions serve as labels with soft maps.
    data = data_module(root, labels=root / "out", soft=True)
    data.setup("fit")
    item = data.training_images[0]
    inside = item["mask"] != 255
    top = item["soft"].topk(2, dim=0).values
    clear = inside & (top[0] - top[1] > 2e-3)  # files hold half precision
    assert int(clear.sum()) > 100
    assert torch.equal(item["soft"].argmax(0)[clear], item["mask"][clear])


@pytest.mark.parametrize("tar", [None, 2])
def test_images_of_an_earlier_run_reach_the_server_too(root: Path, tar: int | None) -> None:
    def predict(*more: Callback) -> None:
        writer = MaskWriter(root / f"out{tar}", tar=tar)
        run = trainer(root, writer, *more)
        run.predict(small(), data_module(root), return_predictions=False)

    predict()
    predict(VOCServerWriter(root / f"server{tar}", "comp6", "val"))
    folder = root / f"server{tar}/results/VOC2012/Segmentation/comp6_val_cls"
    written = LabelFolder(root / f"out{tar}")
    for image_id in IDS:
        assert (folder / f"{image_id}.png").read_bytes() == written.mask_file(image_id).read_bytes()


def test_test_scores_are_those_of_the_written_files(root: Path) -> None:
    module = small(scales=(0.75, 1.0), flip=True, crf=CRFSettings(iterations=2))
    found = trainer(root).test(module, data_module(root))[0]
    trainer(root, MaskWriter(root / "out")).predict(
        module, data_module(root), return_predictions=False
    )
    truth = root / "VOCdevkit/VOC2012/SegmentationClass"
    counts = [
        confusion_matrix(
            label_file(root / "out/masks" / f"{name}.png"), label_file(truth / f"{name}.png"), 21
        )
        for name in IDS
    ]
    assert found["test/miou"] == pytest.approx(100 * mean_iou(np.stack(counts)), abs=1e-3)


@pytest.mark.parametrize("loop", ["fit", "validate"])
def test_wrong_number_of_labels_is_named(root: Path, loop: str) -> None:
    module = SegmentationModule(SmallDeepLab(13, 4))
    with pytest.raises(ConfigurationError, match="13 labels, the data has 21"):
        getattr(trainer(root), loop)(module, data_module(root))


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({"scales": ()}, {}, "scales"),
        ({"size_multiple": 0}, {}, "size_multiple"),
        ({"heads": ["no_such"]}, {}, "heads"),
        ({}, {"max_epochs": -1}, "max_epochs"),
        ({"loss": SoftCrossEntropy()}, {}, r"data\.soft"),
    ],
)
def test_impossible_runs_are_refused(
    root: Path, changes: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        trainer(root, **settings).fit(small(**changes), data_module(root))


def test_every_process_draws_its_own_numbers_in_every_epoch() -> None:
    """The same again in a run that is resumed."""

    def drawn(epoch: int, rank: int, seed: int = 0) -> float:
        module = SegmentationModule(Dropping(), seed=seed)
        module._trainer = SimpleNamespace(  # type: ignore[assignment]
            current_epoch=epoch, global_rank=rank
        )
        module.on_train_epoch_start()
        return float(torch.rand(()))

    with torch.random.fork_rng():
        places = [(epoch, rank, seed) for epoch in (0, 1) for rank in (0, 1) for seed in (0, 1)]
        found = [drawn(*place) for place in places]
        assert len(set(found)) == len(places)
        assert [drawn(*place) for place in places] == found
