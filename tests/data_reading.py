"""What tests of the data modules read with."""

from pathlib import Path

from datamodules import (
    SeedDataModule,
    VOCDataModule,
)
from g4seg_pl.types import FailedSample, Sample


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
