"""An output folder whose masks lie in WebDataset's tars, so that no folder holds a million files.

::

    OUT/run.json                         as without tars
    OUT/masks/<process>-<number>.tar     samples: png, npz or npy if asked for, and json an image
    OUT/masks/<process>-<number>.jsonl   what is in that tar and where, see tar_manifest.py
    OUT/records.<process>.jsonl          as without tars

Each process fills tars of its own; its name holds rank and shard.
"""

import json
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from g4seg_pl.callbacks.output_folder import MaskSink, OutputFolder, require_file_name
from g4seg_pl.callbacks.tar_manifest import (
    StoredTar,
    stored_tars,
    tar_stems,
    unfinished_path,
    write_manifest,
)
from g4seg_pl.callbacks.tar_writer import TarSize, TarWriter, finish, without
from g4seg_pl.types import RefinedMask


@dataclass(frozen=True)
class TarFolder(OutputFolder):
    """One output folder with its masks in tars.

    Attributes:
        size: when a tar is full.
    """

    size: TarSize = field(default_factory=lambda: TarSize(images=1000))

    def make(self) -> None:
        """Make the folders."""
        self.masks.mkdir(parents=True, exist_ok=True)

    def finished(self) -> set[str]:
        """The ids of all finished images, from manifests; only tars without one are opened.

        What is whole in an unfinished tar is finished: :meth:`mend` makes a tar of it.
        """
        found: set[str] = set()
        for tar in stored_tars(self.masks):
            found.update(tar.ids)
        return found

    def forget(self, ids: Collection[str]) -> None:
        """Remove images from their tars, which are written anew without them."""
        dropped = set(ids)
        for tar in stored_tars(self.masks):
            if tar.state != "unfinished" and not dropped.isdisjoint(tar.ids):
                without(tar, [each for each in tar.samples if each.image_id not in dropped])

    def mend(self, *, shard: str | None) -> None:
        """Finish tars that killed runs left, and say which tars are missing or were cut short.

        What is whole in them is kept, of an image that two runs made the copy in the first tar: who
        reads the tars could not tell which counts. Tars that another run is filling are left alone.

        Args:
            shard: the part of the data that this run is over; it matters where the file system
                has no locks: then only tars of the same part are finished, or all without a part.
        """
        prefix = "" if shard is None else f"shard{shard.replace('/', 'of')}."
        for stem in tar_stems(self.masks):
            if not (self.masks / f"{stem}.tar").exists():
                continue
            # Left where a tar was to be written anew, and the run was killed.
            unfinished_path(self.masks, stem).unlink(missing_ok=True)
        for tar in stored_tars(self.masks):
            _mend(tar, ours=tar.stem.startswith(prefix))
        self._drop_second_copies()

    def _drop_second_copies(self) -> None:
        """Write tars anew without the images of earlier ones, and say so."""
        seen: set[str] = set()
        for tar in stored_tars(self.masks):
            if tar.state != "whole":
                continue
            ids = set(tar.ids)
            if again := ids & seen:
                print(
                    f"{tar.path}: {len(again)} images lie in another tar too, made by two runs at "
                    "once; these copies are dropped",
                    file=sys.stderr,
                )
                without(tar, [each for each in tar.samples if each.image_id not in again])
            seen |= ids

    def sink(self, process: str) -> MaskSink:
        """Where a process puts its masks; see the class."""
        return _Tars(self, TarWriter(self.masks, process, self.size))


@dataclass(frozen=True)
class _Tars:
    """Masks go into the tars of one process."""

    folder: TarFolder
    writer: TarWriter

    def save(self, mask: RefinedMask, record: dict[str, Any]) -> None:
        """Append the files of one image."""
        require_file_name(mask.image_id)
        files = self.folder.contents(mask)
        label = files.pop("png")
        text = json.dumps(record).encode()
        self.writer.add(mask.image_id, {"png": label, **files, "json": text})

    def close(self) -> None:
        """Finish the tar that is being filled."""
        self.writer.close()


def _mend(tar: StoredTar, *, ours: bool) -> None:
    """Put one tar right, saying what was lost."""
    match tar.state:
        case "unfinished":
            finish(tar, ours=ours)
        case "unlisted":
            write_manifest(tar.manifest, tar.path.stat().st_size, tar.samples)
        case "cut short":
            _say(f"{tar.path} was cut short or changed: {len(tar.found)} images in it are whole")
            finish(tar, ours=True)
        case "missing":
            held = tar.listing.images if tar.listing else 0
            _say(f"{tar.path} is missing, which held {held} images")
            tar.manifest.unlink(missing_ok=True)


def _say(problem: str) -> None:
    """Name a loss on standard error."""
    print(f"{problem}; what is lost of this run's images is made again", file=sys.stderr)
