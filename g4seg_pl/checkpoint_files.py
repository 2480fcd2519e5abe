"""Checkpoints that replace the earlier one whole or not at all."""

import io
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO


class WholeCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside the one that it replaces, then rename it.

    Lightning's own way writes to the system's temporary folder first. Where that is another file
    system, it then copies over the earlier checkpoint: a process killed there, or a disk that is
    full, would leave nothing to go on from.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save a checkpoint; until it is whole, the file that was there stays as it is.

        Args:
            checkpoint: what `torch.save` takes.
            path: of the file; addresses of other than local files are left to Lightning.
            storage_options: refused, as Lightning does.

        Raises:
            OSError: the file cannot be written.
            TypeError: storage options are given.
        """
        system, local = url_to_fs(str(path))
        if storage_options is not None or not isinstance(system, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(local)
        target.parent.mkdir(parents=True, exist_ok=True)
        # The same name each time: killed runs do not leave one file each, as large as the model.
        unfinished = target.with_name(f".{target.name}.unfinished")
        content = io.BytesIO()  # of a full disk, torch.save to a file would not tell the cause
        torch.save(checkpoint, content)
        try:
            with unfinished.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())  # a name must not outlive the bytes it stands for
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


def keep_checkpoints_whole(trainer: pl.Trainer) -> None:
    """Let a trainer save by `WholeCheckpointIO`, unless it was given a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
