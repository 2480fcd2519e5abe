"""Filling tars with samples, so that a tar bears its name only when it is complete."""

import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from g4seg_pl.callbacks.folder_lock import try_lock
from g4seg_pl.callbacks.tar_manifest import StoredTar, tar_stems, unfinished_path, write_manifest
from g4seg_pl.callbacks.tar_samples import END_OF_TAR, StoredSample, pack, whole_samples
from g4seg_pl.types import ConfigurationError

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@dataclass(frozen=True)
class TarSize:
    """When a tar is full.

    Attributes:
        images: most images in a tar; None for any number.
        bytes: most bytes of a tar, unless one image alone needs more; None for any number.
    """

    images: int | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, text: int | str) -> "TarSize":
        """Read ``1000``, a number of images, or ``256MB``, a number of bytes.

        Raises:
            ConfigurationError: it is neither, or not above 0.
        """
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(?:([kMG]i?|)(B))?", str(text).strip())
        number = float(match[1]) if match else 0.0
        if match and match[3] and number * _UNITS[match[2]] >= 1:
            return cls(bytes=int(number * _UNITS[match[2]]))
        if match and not match[3] and number >= 1 and number == int(number):
            return cls(images=int(number))
        msg = (
            f"writer.tar is {text!r}: give the images in a tar, such as 1000, or its size, such as "
            "256MB or 1GiB"
        )
        raise ConfigurationError(msg)

    def is_passed(self, images: int, size: int) -> bool:
        """Whether a tar of so many images and bytes is larger than it may be."""
        too_many = self.images is not None and images > self.images
        return too_many or (self.bytes is not None and size > self.bytes)


class TarWriter:
    """Put the samples of one process into tars of its own, one after the other.

    A tar is filled under a hidden name, sample after sample. When it is full it is renamed, and its
    manifest is written. A process that is killed leaves the tar it was filling, of which
    :func:`finish` saves every whole sample. Safe to use from several threads.

    Args:
        folder: where the tars lie; it exists.
        process: begins their names, such as ``rank0``.
        limit: when a tar is full.
    """

    def __init__(self, folder: Path, process: str, limit: TarSize) -> None:
        self.folder, self.process, self.limit = folder, process, limit
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._stem = ""
        self._samples: list[StoredSample] = []

    def add(self, image_id: str, files: Mapping[str, bytes]) -> None:
        """Append a sample; it is on its way to the disk when this returns.

        Args:
            image_id: of the image.
            files: contents by suffix, ``json`` last.

        Raises:
            OSError: the disk refuses; nothing of the sample remains.
        """
        packed, sample = pack(image_id, files)
        with self._lock:
            after = self._end() + len(packed) + len(END_OF_TAR)
            if self._samples and self.limit.is_passed(len(self._samples) + 1, after):
                self._finish()
            file = self._file or self._begin()
            _append(file, packed, self._end())
            self._samples.append(sample.moved(self._end()))
            if self.limit.is_passed(len(self._samples) + 1, 0):
                self._finish()

    def close(self) -> None:
        """Finish the tar that is being filled."""
        with self._lock:
            self._finish()

    def _end(self) -> int:
        """Where the next sample begins."""
        return self._samples[-1].end if self._samples else 0

    def _begin(self) -> FileIO:
        """Start a tar under the next number that is free."""
        taken = set(tar_stems(self.folder))
        numbers = [_number(stem, self.process) for stem in taken]
        number = max(numbers, default=-1) + 1
        self._stem = f"{self.process}-{number:06d}"
        file = FileIO(unfinished_path(self.folder, self._stem), "xb")
        try_lock(file)  # while it is held, no other run takes the tar for a killed one's
        self._file = file
        return file

    def _finish(self) -> None:
        """Complete the tar, if there is one."""
        if self._file is None:
            return
        if self._samples:
            complete(self._file, self.folder, self._stem, self._samples)
        else:
            unfinished_path(self.folder, self._stem).unlink()
        self._file.close()
        self._file, self._samples = None, []


def complete(file: FileIO, folder: Path, stem: str, samples: list[StoredSample]) -> None:
    """End a tar behind its last sample, give it its name, then write its manifest."""
    end = samples[-1].end
    _append(file, END_OF_TAR, end)
    os.fsync(file.fileno())  # once a tar: a name must not outlive the bytes it stands for
    unfinished_path(folder, stem).replace(folder / f"{stem}.tar")
    write_manifest(folder / f"{stem}.jsonl", end + len(END_OF_TAR), samples)


def finish(tar: StoredTar, *, ours: bool) -> bool:
    """Complete a tar that a killed run left, or that was cut short, with what is whole in it.

    Args:
        tar: unfinished or cut short.
        ours: what to do where the file system has no locks that would tell whether a run is still
            filling the tar: true takes it for left behind.

    Returns:
        whether it was left behind; if nothing was whole in it, it is gone.
    """
    try:
        with FileIO(tar.path, "r+b") as file:
            free = try_lock(file)
            # Whoever filled it may have finished it since it was opened here.
            if not (ours if free is None else free) or not _is_at(file, tar.path):
                return False
            _finish_open(file, tar)
    except FileNotFoundError:
        return False
    return True


def _finish_open(file: FileIO, tar: StoredTar) -> None:
    """Complete a tar that nobody else writes, or remove it."""
    samples = list(whole_samples(tar.path))
    tar.manifest.unlink(missing_ok=True)
    if not samples:
        tar.path.unlink()
        return
    if tar.state != "unfinished":
        tar.path.replace(unfinished_path(tar.folder, tar.stem))
    complete(file, tar.folder, tar.stem, samples)


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether an open file still has this name."""
    here, there = os.fstat(file.fileno()), path.stat()
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def without(tar: StoredTar, keep: Iterable[StoredSample]) -> None:
    """Write a tar anew with some of its samples; without any it is removed."""
    kept = list(keep)
    # First, for a tar without a manifest is read, and a manifest without a tar tells of a loss.
    tar.manifest.unlink(missing_ok=True)
    if not kept:
        tar.path.unlink()
        return
    moved: list[StoredSample] = []
    with tar.path.open("rb") as old, FileIO(unfinished_path(tar.folder, tar.stem), "wb") as new:
        for sample in kept:
            begin = moved[-1].end if moved else 0
            old.seek(sample.begin)
            _append(new, old.read(sample.end - sample.begin), begin)
            moved.append(sample.moved(begin))
        complete(new, tar.folder, tar.stem, moved)


def _append(file: FileIO, content: bytes, at: int) -> None:
    """Write at a place and end the file there; if that fails, end it before."""
    try:
        file.seek(at)
        file.truncate()
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
    except OSError:
        file.truncate(at)
        raise


def _number(stem: str, process: str) -> int:
    """The number of a tar; -1 if it is of another process."""
    head, _, number = stem.rpartition("-")
    return int(number) if head == process and number.isdecimal() else -1
