"""More classes than label images of 8 bits can hold are refused before any weights are loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from datamodules.classes import read_class_list
from g4seg_pl.module import G4SegModule
from g4seg_pl.seeds.cam import Cam
from g4seg_pl.seeds.clip_es import ClipES
from g4seg_pl.seeds.diffsegmenter import DiffSegmenter
from g4seg_pl.seeds.groupvit import GroupVit
from g4seg_pl.seeds.maskclip import MaskClip
from g4seg_pl.seeds.sclip import Sclip
from g4seg_pl.seeds.supervised import Supervised
from g4seg_pl.types import ConfigurationError, FailedSample, Sample

# None of these has weights: loading them would be another error.
MAKERS: list[Callable[[], Any]] = [
    lambda: Cam("resnet18", weights="nowhere"),
    lambda: ClipES("nowhere"),
    lambda: DiffSegmenter("nowhere"),
    lambda: GroupVit("nowhere"),
    lambda: MaskClip("nowhere"),
    lambda: Sclip("nowhere"),
    lambda: Supervised("nowhere"),
    lambda: G4SegModule("nowhere"),
]


@pytest.mark.parametrize("make", MAKERS)
def test_of_the_data(
    make: Callable[[], Any],
    new_trainer: Callable[[], pl.Trainer],
    data_of: Callable[..., pl.LightningDataModule],
) -> None:
    data = data_of(read_class_list("context459"))
    with pytest.raises(ConfigurationError, match=r"^data\.class_names: 459 classes.* hold 254"):
        new_trainer().predict(make(), datamodule=data, return_predictions=False)


@pytest.mark.parametrize(
    ("count", "said"), [(255, "^class_names: 255 classes"), (254, "'nowhere' is no folder")]
)
def test_of_a_makers_own(
    count: int,
    said: str,
    new_trainer: Callable[[], pl.Trainer],
    data_of: Callable[..., pl.LightningDataModule],
) -> None:
    # The data's list plays no part: label values are those of the maker's names.
    maker, data = Sclip("nowhere", class_names=[["dog"]] * count), data_of(["dog"] * 300)
    with pytest.raises(ConfigurationError, match=said):
        new_trainer().predict(maker, datamodule=data, return_predictions=False)


def test_training_writes_no_masks(
    new_trainer: Callable[[], pl.Trainer], data_of: Callable[..., pl.LightningDataModule]
) -> None:
    maker, trainer = Cam("resnet18"), new_trainer()
    trainer.datamodule = data_of(["dog"] * 300)  # type: ignore[attr-defined]
    maker.trainer = trainer
    maker.setup("fit")
    with pytest.raises(ConfigurationError, match="300 classes"):
        maker.setup("predict")


def test_outside_a_trainer_no_label_begins_again(worded_clip_folder: Path, sample: Sample) -> None:
    maker = Sclip(str(worded_clip_folder), class_names=[["dog"]] * 255)
    maker.configure_model()
    (failed,) = maker.predict_step([sample])
    assert isinstance(failed, FailedSample)
    assert "255 classes" in failed.error
