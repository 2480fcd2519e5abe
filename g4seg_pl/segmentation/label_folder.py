"""Label files that `g4seg predict` wrote, in files or tars, or any folder of `<id>.png`."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datamodules.files import File
from g4seg_pl.segmentation.label_tars import LabelTars, lie_in_tars
from g4seg_pl.types import ConfigurationError

SHOWN = 10
SOFT_SUFFIXES = (".npz", ".npy")


class LabelFolder:
    """Where the masks and soft maps of an output folder lie.

    Args:
        root: the output folder (with ``masks``, perhaps ``soft`` and ``run.json``), or a folder
            of label files, or of tars, alone.
        argument: its name, for errors.

    Raises:
        ConfigurationError: there is no such folder, its run.json is damaged, or a tar is missing
            or damaged.
    """

    def __init__(self, root: Path, argument: str = "labels") -> None:
        if not root.is_dir():
            msg = f"{argument}: no folder {root}; give the folder that g4seg predict wrote"
            raise ConfigurationError(msg)
        self.root = root
        self.masks = root / "masks" if (root / "masks").is_dir() else root
        self.record = _read_record(root / "run.json", argument)
        self._tars = LabelTars(self.masks, argument) if lie_in_tars(self.masks) else None

    def mask_file(self, image_id: str) -> File:
        """The label file of an image, present or not."""
        found = None if self._tars is None else self._tars.find(image_id, ".png")
        return found or self.masks / f"{image_id}.png"

    def soft_file(self, image_id: str) -> File | None:
        """The soft maps of an image; None if there are none."""
        files: Iterable[File | None]
        if self._tars is not None:
            files = [self._tars.find(image_id, suffix) for suffix in SOFT_SUFFIXES]
        else:
            files = [self.root / "soft" / f"{image_id}{suffix}" for suffix in SOFT_SUFFIXES]
        return next((file for file in files if file is not None and file.is_file()), None)

    def require(self, ids: Sequence[str], split: object, *, soft: bool) -> None:
        """Check that every image has its files.

        Args:
            ids: of the images to be trained on.
            split: their split, for the message.
            soft: whether soft maps are needed too.

        Raises:
            ConfigurationError: names those that lack a file, and what the folder was made of.
        """
        self._complain([name for name in ids if not self.mask_file(name).is_file()], ids, split)
        if soft and (bare := [name for name in ids if self.soft_file(name) is None]):
            place = self.root / "soft" if self._tars is None else self.masks
            msg = (
                f"labels: {len(bare)} of {len(ids)} training images have no soft map in {place}: "
                f"{_listed(bare)}. Predict with --writer.soft npz, or set data.soft to false"
            )
            raise ConfigurationError(msg)

    def _complain(self, missing: list[str], ids: Sequence[str], split: object) -> None:
        """Raise if masks are missing."""
        if not missing:
            return
        made_of = self.record.get("split")
        origin = f" (made of split {made_of!r})" if made_of is not None else ""
        unfinished = [] if self._tars is None else self._tars.unfinished
        left = f"; {unfinished[0].name} there is unfinished" if unfinished else ""
        msg = (
            f"labels: {len(missing)} of {len(ids)} training images of split {str(split)!r} have no "
            f"mask in {self.masks}{origin}: {_listed(missing)}{left}. Run g4seg predict on this "
            "split, or train on the split, or the list of images, that the masks were made of"
        )
        raise ConfigurationError(msg)


def _listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _read_record(path: Path, argument: str) -> dict[str, Any]:
    """The run record; empty if there is none.

    Raises:
        ConfigurationError: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{argument}: {path} cannot be read as a run record ({error})"
        raise ConfigurationError(msg) from error
    if not isinstance(record, dict):
        msg = f"{argument}: {path} is no run record; remove it, or give another folder"
        raise ConfigurationError(msg)
    return record
