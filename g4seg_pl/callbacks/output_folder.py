"""The folder a run writes: where things lie in it, and writing them so that no half file remains.

::

    OUT/run.json               what made it (run_record.py)
    OUT/masks/<id>.png         indexed label file; its presence means that the image is finished
    OUT/soft/<id>.npz or .npy  soft maps, if asked for
    OUT/records.rank<k>.jsonl  one line an image: done or failed, and why

With tars, see :mod:`g4seg_pl.callbacks.tar_folder`, masks and soft maps lie in these instead.
"""

import io
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from g4seg_pl.callbacks.palette import label_image
from g4seg_pl.callbacks.records import last_records
from g4seg_pl.callbacks.tar_manifest import holds_tars, tar_files
from g4seg_pl.types import BadItemError, RefinedMask

SoftFormat = Literal["none", "npz", "clip_es", "irn"]

SOFT_SUFFIXES = ("npz", "npy")
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")  # see write_bytes_atomically


@dataclass(frozen=True)
class RunSummary:
    """How a run went, over all its processes.

    Attributes:
        done: images finished by this run.
        skipped: images found finished when it began.
        failed: images that could not be refined, with the error of each.
        total: images asked for.
        lost_processes: ranks of processes that failed, died or hung.
    """

    done: int
    skipped: int
    failed: dict[str, str]
    total: int
    lost_processes: tuple[int, ...] = ()

    def __str__(self) -> str:
        """The last line of a run."""
        line = f"done {self.done} / skipped {self.skipped} / failed {len(self.failed)}"
        left = self.not_tried
        return f"{line} / total {self.total}" + (f" ({left} not tried)" if left else "")

    @property
    def not_tried(self) -> int:
        """Images asked for of which nothing is known: a process died, or batches were limited."""
        return max(0, self.total - self.done - self.skipped - len(self.failed))


class MaskSink(Protocol):
    """Where one process puts its masks."""

    def save(self, mask: RefinedMask, record: dict[str, Any]) -> None:
        """Write the files of one image; safe to call from several threads."""

    def close(self) -> None:
        """Complete what was begun."""


@dataclass(frozen=True)
class OutputFolder:
    """One output folder.

    Attributes:
        root: the folder; made when something is written.
        soft: how soft maps are kept: ``none``, ``npz`` (``foreground`` float16 ``(K, H, W)`` and
            ``class_ids``; where steps found them out, ``confidence`` and ``pixel_weights`` like
            ``foreground``, ``score`` and ``score_error`` float32 ``(K,)``), or ``.npy``
            dictionaries as CLIP-ES or IRN write them, which hold the foreground alone.
    """

    root: Path
    soft: SoftFormat = "none"

    @property
    def run_json(self) -> Path:
        """The run record."""
        return self.root / "run.json"

    @property
    def masks(self) -> Path:
        """Where the masks lie."""
        return self.root / "masks"

    @property
    def soft_suffix(self) -> str | None:
        """Suffix of the files of soft maps, without dot; None if there are none."""
        return {"none": None, "npz": "npz"}.get(self.soft, "npy")

    def mask_path(self, image_id: str) -> Path:
        """The label file of an image."""
        return self.masks / f"{image_id}.png"

    @property
    def soft_maps(self) -> Path:
        """Where the soft maps lie."""
        return self.root / "soft"

    def soft_path(self, image_id: str) -> Path:
        """The soft maps of an image."""
        return self.soft_maps / f"{image_id}.{self.soft_suffix}"

    def finished(self) -> set[str]:
        """The ids of all finished images, from listings alone: no file is looked at."""
        return set(_ids_below(self.masks))

    def holds_masks(self) -> bool:
        """Whether any image is finished, in a file or in a tar."""
        return holds_tars(self.masks) or next(_ids_below(self.masks), None) is not None

    def make(self) -> None:
        """Make the folders."""
        self.masks.mkdir(parents=True, exist_ok=True)
        if self.soft != "none":
            self.soft_maps.mkdir(exist_ok=True)

    def forget(self, ids: Collection[str]) -> None:
        """Remove the masks and soft maps of the given images, masks first."""
        for image_id in ids:
            self.mask_path(image_id).unlink(missing_ok=True)
            self._forget_soft(image_id, SOFT_SUFFIXES)

    def _forget_soft(self, image_id: str, suffixes: Iterable[str]) -> None:
        """Remove an image's soft maps of some forms."""
        for suffix in suffixes:
            (self.soft_maps / f"{image_id}.{suffix}").unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every mask, in files and in tars, and every soft map.

        A kill may have left soft maps without a mask, and files under temporary names.
        """
        OutputFolder.forget(self, set(_ids_below(self.masks)))
        for folder, suffixes in ((self.masks, ()), (self.soft_maps, SOFT_SUFFIXES)):
            for name in list(_files_below(folder)):
                path = folder / name
                if path.suffix[1:] in suffixes or _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        for path in tar_files(self.masks):
            path.unlink(missing_ok=True)

    def mend(self, *, shard: str | None) -> None:
        """Put right what killed runs left; here there is nothing, for files are whole or absent.

        Args:
            shard: the part of the data that this run is over.
        """

    def sink(self, process: str) -> MaskSink:
        """Where a process puts its masks.

        Args:
            process: its name, no other's at this moment, such as ``rank0``.
        """
        return _Files(self)

    def save(self, mask: RefinedMask) -> None:
        """Write the files of one image, the label file last.

        Raises:
            BadItemError: if the id is not a plain file name.
            OSError: if the disk refuses.
        """
        require_file_name(mask.image_id)
        for suffix, content in self.contents(mask).items():
            if suffix in SOFT_SUFFIXES:  # one of another form might be read in place of this one
                others = (other for other in SOFT_SUFFIXES if other != suffix)
                self._forget_soft(mask.image_id, others)
            path = self.mask_path if suffix == "png" else self.soft_path
            write_bytes_atomically(path(mask.image_id), content)

    def contents(self, mask: RefinedMask) -> dict[str, bytes]:
        """The files of one image by their suffix, the label file last."""
        label, soft = io.BytesIO(), io.BytesIO()
        if self.soft_suffix is not None:
            self._save_soft(mask, soft)
        label_image(mask.label.numpy()).save(label, format="PNG")
        maps = {} if self.soft_suffix is None else {self.soft_suffix: soft.getvalue()}
        return {**maps, "png": label.getvalue()}

    def _save_soft(self, mask: RefinedMask, file: BinaryIO) -> None:
        """Write the soft maps in the chosen format."""
        if self.soft == "npz":
            np.savez_compressed(file, allow_pickle=False, **_soft_arrays(mask))
            return
        from datamodules.seed_files import clip_es, irn

        dialect = clip_es if self.soft == "clip_es" else irn
        dialect.write(file, mask.class_ids, mask.foreground.numpy())


@dataclass(frozen=True)
class _Files:
    """Masks go into files of their own."""

    folder: OutputFolder

    def save(self, mask: RefinedMask, record: dict[str, Any]) -> None:
        self.folder.save(mask)

    def close(self) -> None:
        """Nothing is open."""


def _ids_below(folder: str | Path) -> Iterator[str]:
    """Names without ``.png`` of the label files in a folder and in those below it."""
    for name in _files_below(folder):
        if name.endswith(".png"):
            yield name.removesuffix(".png")


def _files_below(folder: str | Path, prefix: str = "") -> Iterator[str]:
    """Names of the files in a folder, which need not exist, and in those below it."""
    if not Path(folder).is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files_below(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name


def _soft_arrays(mask: RefinedMask) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file: maps in half precision, numbers a mask in single."""
    arrays: dict[str, NDArray[Any]] = {"class_ids": np.asarray(mask.class_ids)}
    for name in ("foreground", "confidence", "pixel_weights", "score", "score_error"):
        found = getattr(mask, name)
        if found is not None:
            arrays[name] = found.numpy().astype(np.float16 if found.ndim == 3 else np.float32)
    return arrays


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let ``write`` fill a buffer, then see :func:`write_bytes_atomically`."""
    buffer = io.BytesIO()
    write(buffer)
    write_bytes_atomically(path, buffer.getbuffer())


def write_bytes_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name and rename it.

    The temporary name is always the same for a file: after a kill, the next run overwrites it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, whatever the file's own name: that one may be as long as the disk allows.
    temporary = path.with_name(f".{blake2b(path.name.encode(), digest_size=8).hexdigest()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def require_file_name(image_id: str) -> None:
    """Raise if an id cannot name a file below the output folder; it may have folders in it.

    Raises:
        BadItemError: names the id.
    """
    parts = image_id.split("/")
    if "\\" in image_id or "\0" in image_id or any(part in ("", ".", "..") for part in parts):
        msg = f"image id {image_id!r} is not a plain file name: rename the image or its list entry"
        raise BadItemError(msg)


def summarise(folder: OutputFolder, ids: Collection[str], skipped: Collection[str]) -> RunSummary:
    """What became of the images asked for, read from the folder itself.

    Args:
        folder: where all processes of the run wrote.
        ids: the images asked for.
        skipped: those found finished when the run began.
    """
    asked = set(ids)
    finished = folder.finished() & asked
    last = last_records(folder.root, asked - finished)
    failed = {
        image_id: str(last[image_id].get("error"))
        for image_id in ids
        if last.get(image_id, {}).get("status") == "failed"
    }
    return RunSummary(len(finished - set(skipped)), len(skipped), failed, len(ids))
