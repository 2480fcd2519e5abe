"""A folder of label files that `g4seg predict` wrote, or any folder of `<id>.png`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from g4seg_pl.types import ConfigurationError

SHOWN = 10


class LabelFolder:
    """Where the masks and soft maps of an output folder lie.

    Args:
        root: the output folder (with ``masks``, perhaps ``soft`` and ``run.json``), or a folder
            of label files alone.

    Raises:
        ConfigurationError: there is no such folder, or its run.json is damaged.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            msg = f"labels: no folder {root}; give the folder that g4seg predict wrote"
            raise ConfigurationError(msg)
        self.root = root
        self.masks = root / "masks" if (root / "masks").is_dir() else root
        self.record = _read_record(root / "run.json")

    def mask_path(self, image_id: str) -> Path:
        """The label file of an image, present or not."""
        return self.masks / f"{image_id}.png"

    def soft_path(self, image_id: str) -> Path | None:
        """The soft maps of an image; None if there are none."""
        paths = [self.root / "soft" / f"{image_id}{suffix}" for suffix in (".npz", ".npy")]
        return next((path for path in paths if path.is_file()), None)

    def require(self, ids: Sequence[str], split: object, *, soft: bool) -> None:
        """Check that every image has its files.

        Args:
            ids: of the images to be trained on.
            split: their split, for the message.
            soft: whether soft maps are needed too.

        Raises:
            ConfigurationError: names those that lack a file, and what the folder was made of.
        """
        self._complain([name for name in ids if not self.mask_path(name).is_file()], ids, split)
        if soft and (bare := [name for name in ids if self.soft_path(name) is None]):
            msg = (
                f"labels: {len(bare)} of {len(ids)} training images have no soft map in "
                f"{self.root / 'soft'}: {_listed(bare)}. Predict with --writer.soft npz, or set "
                "data.soft to false"
            )
            raise ConfigurationError(msg)

    def _complain(self, missing: list[str], ids: Sequence[str], split: object) -> None:
        """Raise if masks are missing."""
        if not missing:
            return
        made_of = self.record.get("split")
        origin = f" (made of split {made_of!r})" if made_of is not None else ""
        msg = (
            f"labels: {len(missing)} of {len(ids)} training images of split {str(split)!r} have no "
            f"mask in {self.masks}{origin}: {_listed(missing)}. Run g4seg predict on this split, "
            "or train on the split that the masks were made of"
        )
        raise ConfigurationError(msg)


def _listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _read_record(path: Path) -> dict[str, Any]:
    """The run record; empty if there is none.

    Raises:
        ConfigurationError: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"labels: {path} cannot be read as a run record ({error})"
        raise ConfigurationError(msg) from error
    if not isinstance(record, dict):
        msg = f"labels: {path} is no run record; remove it, or give another folder"
        raise ConfigurationError(msg)
    return record
