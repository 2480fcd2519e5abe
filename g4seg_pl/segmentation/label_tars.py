"""Label files and soft maps in tars, found through the manifests that `g4seg predict` wrote."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from datamodules.archives import TarArchive
from datamodules.files import StoredFile
from g4seg_pl.callbacks.tar_manifest import StoredTar, stored_tars
from g4seg_pl.callbacks.tar_samples import LAST, id_of, key_of
from g4seg_pl.types import ConfigurationError

_AGAIN = "Run g4seg predict into this folder again, which makes what is lost"


class LabelTars:
    """The files of a folder of tars, by image.

    Tars without a manifest, such as those of other programs, are listed by going through their
    headers once; their keys are taken for ids spelled as in
    :mod:`g4seg_pl.callbacks.tar_samples`. Nothing is unpacked.

    Args:
        folder: of the tars.
        argument: its name, for errors.

    Raises:
        ConfigurationError: a tar is missing, cut short or damaged, or two hold the same image.
    """

    def __init__(self, folder: Path, argument: str = "labels") -> None:
        self._argument = argument
        self.unfinished: list[Path] = []
        self._archives: dict[str, tuple[TarArchive, str]] = {}
        listed = set()
        for tar in stored_tars(folder):
            if tar.state == "unfinished":
                self.unfinished.append(tar.path)
            else:
                listed.add(tar.path.name)
                self._add_listed(tar)
        for path in sorted(folder.glob("*.tar")):
            if path.name not in listed:
                self._add(TarArchive(path))

    def find(self, image_id: str, suffix: str) -> StoredFile | None:
        """The file of an image with a suffix, such as ``.png``; None if there is none."""
        archive, key = self._archives.get(image_id, (None, ""))
        name = f"{key}{suffix}"
        return StoredFile(archive, name) if archive is not None and archive.holds(name) else None

    def _add_listed(self, tar: StoredTar) -> None:
        """Take in what a manifest lists."""
        if tar.state in ("missing", "cut short"):
            what = "is missing" if tar.state == "missing" else "was cut short or changed"
            msg = f"{self._argument}: {tar.path} {what}. {_AGAIN}"
            raise ConfigurationError(msg)
        places = {
            f"{key_of(sample.image_id)}.{suffix}": (place.offset, place.size)
            for sample in tar.samples
            for suffix, place in sample.members.items()
            if suffix != LAST
        }
        self._add(TarArchive(tar.path, places))

    def _add(self, archive: TarArchive) -> None:
        """Take in the files of a tar."""
        for image_id, key in _keys(archive):
            other = self._archives.setdefault(image_id, (archive, key))
            if other[0] is not archive:
                msg = (
                    f"{self._argument}: image {image_id} is there twice, in {other[0].url} and in "
                    f"{archive.url}. Keep one of them; where g4seg predict wrote them, the same "
                    "command again does that"
                )
                raise ConfigurationError(msg)


def _keys(archive: TarArchive) -> Iterator[tuple[str, str]]:
    """The ids in a tar, with their keys."""
    for name in archive.names():
        path = PurePosixPath(name)
        key = str(path.with_name(path.name.partition(".")[0] or path.name))
        yield id_of(PurePosixPath(key).name), key


def lie_in_tars(folder: Path) -> bool:
    """Whether a folder has tars in it and no PNG."""
    suffixes = set()
    for path in folder.iterdir():
        if path.suffix == ".png":
            return False
        suffixes.add(path.suffix)
    # Manifests tell of lost tars, and unfinished ones (.tar.tmp) of what is still to come.
    return bool(suffixes & {".tar", ".jsonl", ".tmp"})
