"""Masks in tars, for the tests of writing and of recovering them."""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from g4seg_pl.callbacks.output_folder import MaskSink, OutputFolder
from g4seg_pl.callbacks.tar_folder import TarFolder
from g4seg_pl.types import RefinedMask

IDS = [f"{index}.b" for index in range(7)]


def refined(image_id: str) -> RefinedMask:
    generator = torch.Generator().manual_seed(len(image_id) + ord(image_id[0]))
    label = torch.randint(0, 3, (9, 13), generator=generator).byte()
    return RefinedMask(image_id, (1, 2), torch.rand(2, 9, 13, generator=generator), label)


def fill(folder: TarFolder, ids: Sequence[str] = IDS, process: str = "rank0") -> MaskSink:
    """Write masks and leave the last tar unfinished."""
    folder.make()
    sink = folder.sink(process)
    for image_id in ids:
        sink.save(refined(image_id), {"id": image_id, "height": 9})
    return sink


def files(folder: Path) -> dict[str, bytes]:
    """Every member of every tar of a folder by name, each once."""
    found: dict[str, bytes] = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                assert member.name not in found
                found[member.name] = stream.read()
    return found


def names(folder: OutputFolder) -> list[str]:
    return sorted(path.name for path in folder.masks.iterdir())


def die(sink: Any) -> None:
    """Let go of the open tar as the system does when a process is killed."""
    sink.writer._file.close()
