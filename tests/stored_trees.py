"""Folders of images and seeds in other forms: tars, and folders at addresses."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import torch

from datamodules import FolderDataModule
from g4seg_pl.types import FailedSample, Sample

SIZES = {"a": (12, 17), "b": (9, 20), "c_2": (15, 15), "d": (8, 8)}
FORMS = ("folder", "address", "tar", "tars", "remote tars")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_tar(path: Path, files: Sequence[Path], folder: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        for file in files:
            add(tar, f"{folder}{file.name}", file.read_bytes())
    return path


def upload(file: Path, address: str) -> None:
    with fsspec.open(f"{address}/{file.name}", "wb") as target:
        target.write(file.read_bytes())


def store(folder: Path, form: str, bucket: str) -> str:
    """The files of a local folder in another form; what to give to the DataModule."""
    files = sorted(folder.iterdir())
    match form:
        case "folder":
            return str(folder)
        case "address":
            for file in files:
                upload(file, f"{bucket}/{folder.name}")
            return f"{bucket}/{folder.name}/"
        case "tar":
            return str(write_tar(folder.with_suffix(".tar"), files, "./deep/er/"))
    parts = [
        write_tar(folder.parent / f"{folder.name}-{index:03d}.tar", files[index::3])
        for index in range(3)
    ]
    if form == "tars":
        return str(folder.parent / f"{folder.name}-{{000..002}}.tar")
    for part in parts:
        upload(part, bucket)
    return f"{bucket}/{folder.name}-*.tar"


def samples_of(data: FolderDataModule, **options: Any) -> dict[str, Sample | FailedSample]:
    data.setup()
    loader = data.test_dataloader() if options else data.predict_dataloader()
    return {sample.image_id: sample for batch in loader for sample in batch}


def module(root: str | Path, seeds: str | Path, **options: Any) -> FolderDataModule:
    return FolderDataModule(root, seeds, "voc", **({"num_workers": 0} | options))


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, sample in expected.items():
        other = found[name]
        assert isinstance(other, Sample), other
        assert torch.equal(other.image, sample.image)
        assert torch.equal(other.seed.scores, sample.seed.scores)
        assert other.seed.class_ids == sample.seed.class_ids
        if sample.truth is not None:
            assert torch.equal(other.truth, sample.truth)
