"""One real cycle of self-training with the refiner, and resuming after it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fake_voc import CLASSES, IDS
from lightning.pytorch.callbacks import Callback
from segmentation.test_module import KilledError, Losses, last, small, trainer
from segmentation.trees import data_module, label_file, write_tree

from datamodules import PseudoLabelDataModule
from g4seg_pl.core.background import PowerBackground
from g4seg_pl.core.steps import Correspondence
from g4seg_pl.module import G4SegModule
from g4seg_pl.segmentation.self_training import RefreshPseudoLabels
from g4seg_pl.types import ConfigurationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
]


class Folders(Callback):
    """Which folder each epoch was trained on."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Record the folder."""
        data: PseudoLabelDataModule = trainer.datamodule  # type: ignore[attr-defined]
        folder = data.training_images.reader.folder
        self.seen.append(folder.root.name if folder else "truth")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_tree(tmp_path)
    return tmp_path


def test_one_cycle_with_the_refiner(root: Path, sd1_folder: Path) -> None:
    refiner = G4SegModule(
        str(sd1_folder),
        update=[Correspondence(confidence_range=None, beta=0.5)],
        background=PowerBackground(1.0),
        dtype="float32",
    )
    seen: list[torch.Tensor] = []
    original = refiner.predict_step

    def spy(batch: Any, batch_idx: int = 0) -> Any:
        seen.extend(sample.seed.scores.clone() for sample in batch)
        return original(batch, batch_idx)

    refiner.predict_step = spy  # type: ignore[method-assign]
    loaded: list[bool] = []
    moved = refiner.to

    def to(*args: Any) -> Any:
        loaded.append(refiner.generator is not None)
        return moved(*args)

    refiner.to = to  # type: ignore[method-assign]
    folders = Folders()
    refresh = RefreshPseudoLabels(root / "refreshed", refiner, every_n_epochs=2)
    data = data_module(root, soft=True)
    trainer(root, refresh, folders, max_epochs=4).fit(small(), data)
    assert folders.seen == ["refined", "refined", "epoch002", "epoch002"]
    assert len(seen) == 3
    # Told first where it runs, for its number format; what is loaded then is moved there.
    assert not loaded[0]
    assert all(loaded[1:])
    for image_id, allowed in zip(IDS, CLASSES, strict=True):
        old = label_file(root / "refined/masks" / f"{image_id}.png")
        new = label_file(root / "refreshed/epoch002/masks" / f"{image_id}.png")
        assert new.shape == old.shape
        assert set(np.unique(new).tolist()) <= {0, *allowed}
        soft = np.load(root / "refreshed/epoch002/soft" / f"{image_id}.npz")
        assert soft["foreground"].shape == (len(soft["class_ids"]), *old.shape)
    assert not (root / "refreshed/epoch004").exists()


def test_without_a_refiner_labels_are_the_predictions(root: Path) -> None:
    module = small()
    refresh = RefreshPseudoLabels(root / "refreshed", every_n_epochs=1, first_epoch=1)
    trainer(root, refresh, max_epochs=2).fit(module, data_module(root))
    assert (root / "refreshed/epoch001/run.json").is_file()
    data = data_module(root, labels=root / "refreshed/epoch001")
    data.setup("fit")
    assert len(data.training_images) == 3


class Modes(Callback):
    """Whether the network was training at each batch."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Record it."""
        self.seen.append(pl_module.network.training)


def test_refreshed_labels_are_the_best_of_the_images_own_classes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a network that would find every class everywhere; it trains on afterwards."""
    numbers, predicted = torch.Generator().manual_seed(0), list[torch.Tensor]()

    def everything(_: Any, module: Any, image: torch.Tensor) -> torch.Tensor:
        assert not module.training
        predicted.append(torch.rand(21, *image.shape[1:], generator=numbers))
        return predicted[-1] / predicted[-1].sum(0)

    monkeypatch.setattr(RefreshPseudoLabels, "_probabilities", everything)
    refresh, modes = RefreshPseudoLabels(root / "refreshed", every_n_epochs=1), Modes()
    trainer(root, refresh, modes, max_epochs=2).fit(small(), data_module(root))
    assert modes.seen
    assert all(modes.seen)
    for image_id, own, scores in zip(IDS, CLASSES, predicted, strict=True):
        candidates = np.array([0, *sorted(own)])
        expected = candidates[scores[candidates].argmax(0)]
        found = label_file(root / "refreshed/epoch001/masks" / f"{image_id}.png")
        np.testing.assert_array_equal(found, expected)


def test_resumed_run_trains_on_the_refreshed_labels(root: Path) -> None:
    def callbacks() -> list[Callback]:
        return [RefreshPseudoLabels(root / "refreshed", every_n_epochs=1), last(root)]

    trainer(root, *callbacks(), max_epochs=3).fit(small(), data_module(root))
    folders = Folders()
    again = trainer(root, *callbacks(), folders, max_epochs=4)
    again.fit(small(), data_module(root), ckpt_path=str(root / "ckpt/last.ckpt"))
    assert folders.seen == ["epoch002"]


def test_a_run_that_resumes_behind_a_refresh_does_not_refresh_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def callbacks() -> list[Callback]:
        return [RefreshPseudoLabels(root / "refreshed", every_n_epochs=2), last(root)]

    refreshed: list[str] = []
    refresh = RefreshPseudoLabels._refresh

    def noted(self: RefreshPseudoLabels, *given: Any) -> None:
        refreshed.append(given[-1].name)
        refresh(self, *given)

    monkeypatch.setattr(RefreshPseudoLabels, "_refresh", noted)
    # Killed within the epoch behind the refresh: the last checkpoint is that of epoch 2.
    steps = {"max_epochs": -1, "max_steps": 3 * 3}
    killed = trainer(root, *callbacks(), Losses(die_at=3 * 2 + 1), **steps)
    with pytest.raises(KilledError):
        killed.fit(small(), data_module(root, batch_size=1))
    assert refreshed == ["epoch002"]
    again = trainer(root, *callbacks(), **steps)
    path = str(root / "ckpt/last.ckpt")
    again.fit(small(), data_module(root, batch_size=1), ckpt_path=path)
    assert refreshed == ["epoch002"]


def test_other_data_is_refused(root: Path) -> None:
    class Other(pl.LightningDataModule):
        label_names = tuple(f"{index}" for index in range(21))

        def train_dataloader(self) -> Any:
            data = data_module(root)
            data.setup("fit")
            return data.train_dataloader()

    refresh = RefreshPseudoLabels(root / "refreshed", every_n_epochs=1)
    run = trainer(root, refresh, max_epochs=2, limit_val_batches=0)
    with pytest.raises(ConfigurationError, match="needs PseudoLabelDataModule, got Other"):
        run.fit(small(), Other())
    with pytest.raises(ConfigurationError, match="every_n_epochs"):
        RefreshPseudoLabels(root, every_n_epochs=0)
