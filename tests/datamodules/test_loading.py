"""Shards, exclusion, processes and workers of the data modules."""

import itertools
import os
import pickle
import signal
from pathlib import Path

import lightning
import pytest
import torch
from data_reading import ids, module, read_all

from datamodules.pseudo_labels import PseudoLabelDataModule
from datamodules.sampling import ProcessSampler
from g4seg_pl.types import FailedSample, Sample


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
class AskedToEnd(torch.utils.data.Dataset[int]):
    """Sends SIGTERM to the process that reads."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return index


def test_workers_outlive_the_signal_that_ends_a_run(voc: Path) -> None:
    data = module(voc, "train_aug", num_workers=1)
    labels = PseudoLabelDataModule(data, None, val=data, num_workers=1)
    loaders = [data.predict_dataloader(), data.train_dataloader(), labels.predict_dataloader()]
    for loader in loaders:
        asked = torch.utils.data.DataLoader(
            AskedToEnd(), num_workers=1, worker_init_fn=loader.worker_init_fn
        )
        assert [int(read) for read in asked] == [0, 1]


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
