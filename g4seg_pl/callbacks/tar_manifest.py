"""The manifests beside the tars of a run: what each holds, so that no tar need be opened for it.

::

    masks/rank0-000000.tar       complete: it came here by renaming
    masks/rank0-000000.jsonl     its manifest, written after it
    masks/.rank0-000001.tar.tmp  being filled, or left by a killed run

The first line of a manifest gives the tar's size in bytes and its number of images; then one line
an image gives its id and the place ``[offset, size]`` of each of its files in the tar. Without its
manifest a tar is read itself. One of another size than its manifest says was cut short or changed.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from g4seg_pl.callbacks.run_record import write_text_atomically
from g4seg_pl.callbacks.tar_samples import (
    END_OF_TAR,
    Place,
    StoredSample,
    padded,
    whole_samples,
)
from g4seg_pl.types import ConfigurationError

TAR, MANIFEST, UNFINISHED = ".tar", ".jsonl", ".tar.tmp"
LOOKS = 5
_SUFFIXES = {False: (TAR, MANIFEST), True: (UNFINISHED,)}
_OURS = re.compile(r"(shard[0-9]+of[0-9]+\.)?rank[0-9]+-[0-9]{6,}")

State = Literal["whole", "unlisted", "cut short", "missing", "unfinished"]


@dataclass(frozen=True)
class StoredTar:
    """What there is of one tar.

    Attributes:
        folder: where it lies.
        stem: its name without suffix: process and number.
        state: ``whole``; ``unlisted`` without a manifest; ``cut short`` if its size is not what
            the manifest says, or it does not end as a tar does; ``missing`` if there is a manifest
            alone; ``unfinished``.
        found: the whole samples in it, where the tar itself was read.
        listing: its manifest, if that serves instead.
    """

    folder: Path
    stem: str
    state: State
    found: tuple[StoredSample, ...] = field(repr=False, default=())
    listing: "Manifest | None" = field(repr=False, default=None)

    @property
    def samples(self) -> tuple[StoredSample, ...]:
        """The whole samples in it; none in a missing tar."""
        if self.state == "whole" and self.listing is not None:
            return self.listing.samples()
        return self.found

    @property
    def ids(self) -> list[str]:
        """The ids of its samples."""
        if self.state == "whole" and self.listing is not None:
            return self.listing.ids()
        return [sample.image_id for sample in self.found]

    @property
    def path(self) -> Path:
        """The tar; of an unfinished one, the file that becomes it."""
        unfinished = self.state == "unfinished"
        return unfinished_path(self.folder, self.stem) if unfinished else self.target

    @property
    def target(self) -> Path:
        """The tar's final name."""
        return self.folder / f"{self.stem}{TAR}"

    @property
    def manifest(self) -> Path:
        """The file that lists what is in the tar."""
        return self.folder / f"{self.stem}{MANIFEST}"


def unfinished_path(folder: Path, stem: str) -> Path:
    """The name of a tar while it is filled; hidden, and no ``*.tar``."""
    return folder / f".{stem}{UNFINISHED}"


def tar_stems(folder: Path) -> list[str]:
    """The sorted names, without suffix, of all tars of which there is a file of any kind."""
    return sorted({stem for name in _names(folder) if (stem := _stem(name)) is not None})


def tar_files(folder: Path) -> list[Path]:
    """Every file of a tar, manifests first and unfinished ones last."""
    names = [name for name in _names(folder) if _stem(name) is not None]
    order = (MANIFEST, TAR, UNFINISHED)
    kinds = {name: next(kind for kind in order if name.endswith(kind)) for name in names}
    return [folder / name for name in sorted(names, key=lambda name: order.index(kinds[name]))]


def holds_tars(folder: Path) -> bool:
    """Whether there is anything of a tar."""
    return any(_stem(name) is not None for name in _names(folder))


def stored_tars(folder: Path) -> Iterator[StoredTar]:
    """Every tar of a folder, looked at without changing anything; other runs may be writing."""
    for stem in tar_stems(folder):
        for _ in range(LOOKS):
            try:
                found = _look(folder, stem)
            except FileNotFoundError:  # renamed since its name was read
                continue
            if found is not None:
                yield found
            break


def write_manifest(path: Path, size: int, samples: Sequence[StoredSample]) -> None:
    """Write the manifest of a tar.

    Args:
        path: of the manifest.
        size: of the tar, in bytes.
        samples: all that the tar holds.
    """
    lines = [json.dumps({"tar": f"{path.stem}{TAR}", "bytes": size, "images": len(samples)})]
    for sample in samples:
        places = {name: [place.offset, place.size] for name, place in sample.members.items()}
        lines.append(json.dumps({"id": sample.image_id} | places))
    write_text_atomically(path, "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Manifest:
    """A manifest as it was read; its lines are gone through when they are asked for.

    Attributes:
        path: of the file.
        size: of the tar, in bytes.
        images: how many samples the tar holds.
        lines: one sample each, JSON.
    """

    path: Path
    size: int
    images: int
    lines: list[str] = field(repr=False)

    def ids(self) -> list[str]:
        """The ids of the tar's samples."""
        return [line["id"] for line in self._content()]

    def samples(self) -> tuple[StoredSample, ...]:
        """The tar's samples."""
        begin, samples = 0, []
        for line in self._content():
            samples.append(_sample(line, begin))
            begin = samples[-1].end
        return tuple(samples)

    def _content(self) -> list[dict[str, Any]]:
        """The lines.

        Raises:
            ConfigurationError: they are damaged.
        """
        try:
            # In one go, which is several times as fast as line by line.
            content: list[dict[str, Any]] = json.loads(f"[{','.join(self.lines)}]")
        except ValueError as error:
            msg = f"{self.path} is damaged ({error}): remove it, then the tar itself is read"
            raise ConfigurationError(msg) from error
        return content


def read_manifest(path: Path) -> Manifest | None:
    """A manifest; None if there is none that is complete."""
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        said = json.loads(head)
        manifest = Manifest(path, int(said["bytes"]), int(said["images"]), lines)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return manifest if len(lines) == manifest.images else None


def _sample(line: dict[str, Any], begin: int) -> StoredSample:
    """A sample from its line in a manifest."""
    image_id = str(line.pop("id"))
    members = {name: Place(int(offset), int(size)) for name, (offset, size) in line.items()}
    last = max(members.values())
    return StoredSample(image_id, members, begin, padded(last.offset + last.size))


def _look(folder: Path, stem: str) -> StoredTar | None:
    """What there is of a tar at this moment; None if it is about to begin.

    Raises:
        FileNotFoundError: it was renamed while it was looked at, or there is nothing to look at.
    """
    listed = read_manifest(folder / f"{stem}{MANIFEST}")
    tar, unfinished = folder / f"{stem}{TAR}", unfinished_path(folder, stem)
    if tar.exists():
        size = tar.stat().st_size
        if listed is not None and size == listed.size:
            return StoredTar(folder, stem, "whole", listing=listed)
        found = tuple(whole_samples(tar))
        if listed is None and found and size == found[-1].end + len(END_OF_TAR):
            return StoredTar(folder, stem, "unlisted", found)
        return StoredTar(folder, stem, "cut short", found)
    if unfinished.exists():
        if not unfinished.stat().st_size:
            return None
        return StoredTar(folder, stem, "unfinished", tuple(whole_samples(unfinished)))
    if listed is None:
        raise FileNotFoundError(tar)
    return StoredTar(folder, stem, "missing", listing=listed)


def _names(folder: Path) -> Iterator[str]:
    """The names in a folder, which need not exist."""
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries)


def _stem(name: str) -> str | None:
    """The name of the tar that a file belongs to; None if it is none of a run's files."""
    hidden = name.startswith(".")
    suffix = next((each for each in _SUFFIXES[hidden] if name.endswith(each)), None)
    stem = name[hidden:].removesuffix(suffix or "")
    return stem if suffix is not None and _OURS.fullmatch(stem) else None
