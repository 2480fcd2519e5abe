"""`g4seg convert`: seeds of any dialect into any other."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

# Only typing here: the command line's help must not wait for NumPy and torch.
if TYPE_CHECKING:
    from datamodules.classes import ClassList
    from datamodules.labels import LabelSource
    from datamodules.seed_files.maps import ReadOptions
    from datamodules.seed_files.source import SeedSource
    from datamodules.seed_files.writing import WritableDialect
    from g4seg_pl.types import Seed

SourceDialect = Literal[
    "auto", "clip_es", "irn", "seam", "seam_crf", "weaktr", "mat", "png", "npz", "npy", "coco"
]
TargetDialect = Literal[
    "clip_es", "irn", "seam", "seam_crf", "weaktr", "mat", "png", "npz", "npy", "coco"
]
COCO_FILE = "seeds.json"
"""Name of the one file that `--to coco` writes."""

HARD = ("png", "coco")
"""Dialects that hold labels, not scores."""


def main(words: Sequence[str]) -> int:
    """The command line: `g4seg convert --from auto --to clip_es IN_DIR OUT_DIR`.

    Args:
        words: the arguments.

    Returns:
        Exit code of `convert`.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="g4seg convert", description="Convert seeds between dialects.")
    parser.add_argument("in_dir", type=str, help="folder of seed files, or one COCO JSON file")
    parser.add_argument("out_dir", type=str, help="folder to write to")
    parser.add_argument("--from", type=SourceDialect, default="auto", help="dialect to read")
    parser.add_argument("--to", type=TargetDialect, default="npz", help="dialect to write")
    named: set[str | int] = {"in_dir", "out_dir", "from_dialect", "to_dialect"}
    parser.add_function_arguments(convert, skip=named)
    # jsonargparse 4.49 renamed it.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    given = instantiate(parser.parse_args(list(words))).as_dict()
    dialects = {"from_dialect": given.pop("from"), "to_dialect": given.pop("to")}
    return convert(**dialects, **given)


def convert(
    in_dir: str,
    out_dir: str,
    from_dialect: SourceDialect = "auto",
    to_dialect: TargetDialect = "npz",
    class_names: str = "voc",
    images: str | None = None,
    labels: str | None = None,
    background: float | None = None,
    stride: int = 1,
    options: "ReadOptions | None" = None,
) -> int:
    """Converts every seed of a folder; a bad one is named and skipped, the others are converted.

    Args:
        in_dir: folder of seed files, or one COCO JSON file.
        out_dir: folder to write to, made if needed; files of the same name are replaced.
        from_dialect: dialect to read; `auto` detects it file by file.
        to_dialect: dialect to write; `npz` is the smallest and says which classes it holds;
            `coco` is one file, seeds.json.
        class_names: class list, a file or the name of a bundled one.
        images: folder of the images. Sizes are compared with it; seeds stored smaller than their
            images (IRN's `cam`, reduced npz) and COCO files that do not name their images cannot
            do without.
        labels: file of image-level labels, for plain arrays of present classes.
        background: score below which a pixel is background; `png` and `coco` need it.
        stride: writes maps smaller by this factor; `npz` only.
        options: what the seed files do not say themselves.

    Returns:
        Exit code: 0 if there are seeds and all were converted, 1 otherwise.

    Raises:
        ConfigurationError: a folder or file is missing, or the options do not fit the dialect.
    """
    from datamodules.classes import read_class_list
    from datamodules.labels import FileLabels
    from datamodules.seed_files.source import open_seeds

    _check(to_dialect, background, stride)
    classes = read_class_list(class_names)
    label_source = FileLabels(Path(labels), classes) if labels else None
    seeds = open_seeds(Path(in_dir), classes, from_dialect, options)
    names = seeds.names(_image_names(images))
    target = _target(Path(out_dir), to_dialect, classes, background, stride, names)
    status = _convert_all(names, partial(_labelled, _reader(seeds, images), label_source), target)
    read = ", ".join(f"{count} as {dialect}" for dialect, count in sorted(seeds.seen.items()))
    print(f"read {read or 'nothing'}; {target.told()} as {to_dialect}")
    return status


def _check(to_dialect: TargetDialect, background: float | None, stride: int) -> None:
    from g4seg_pl.types import ConfigurationError

    if to_dialect in HARD and background is None:
        message = f"background: None; {to_dialect} needs the score below which it is background"
        raise ConfigurationError(message)
    if stride < 1 or (stride > 1 and to_dialect != "npz"):
        message = f"stride: {stride} with {to_dialect}; only npz says that its maps are reduced"
        raise ConfigurationError(message)


def _image_names(images: str | None) -> list[str]:
    from datamodules.items import IMAGE_SUFFIXES
    from datamodules.layout import first_folder

    if images is None:
        return []
    folder = first_folder("images", [Path(images)])
    return [path.stem for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]


def _reader(
    seeds: "SeedSource", images: str | None
) -> Callable[[str, tuple[int, ...] | None], "Seed"]:
    """Reads the seed of an id, at the size of its image or else at its own."""
    from datamodules.images import header_size
    from datamodules.items import ImageFolder

    if images is None:
        return seeds.read_unsized
    folder = Path(images)
    find = ImageFolder(folder).find
    return lambda name, labels: seeds.read(name, header_size(find(name)), labels)


def _labelled(
    read: Callable[[str, tuple[int, ...] | None], "Seed"],
    labels: "LabelSource | None",
    name: str,
) -> "Seed":
    return read(name, labels.read(name) if labels else None)


class _Target(Protocol):
    """Where converted seeds go."""

    def write(self, name: str, seed: "Seed") -> None:
        """Takes one seed."""

    def close(self) -> None:
        """Finishes what one file holds together."""

    def told(self) -> str:
        """What was written, in words."""


@dataclass
class _Files:
    """One file an image."""

    folder: Path
    dialect: "WritableDialect"
    classes: int
    background: float | None
    stride: int
    written: int = 0
    size: int = 0

    def write(self, name: str, seed: "Seed") -> None:
        from torch.nn.functional import interpolate

        from datamodules.seed_files.writing import suffix, write_seed

        scores, height, width = seed.scores, seed.scores.shape[1], seed.scores.shape[2]
        if self.stride > 1:
            size = (-(-height // self.stride), -(-width // self.stride))
            if seed.class_ids:
                scores = interpolate(scores[None], size, mode="bilinear", antialias=True)[0]
            scores = scores.clamp(0, 1) if seed.class_ids else scores.new_zeros(0, *size)
        self.size += write_seed(
            self.folder / f"{name}{suffix(self.dialect)}",
            seed.class_ids,
            scores.numpy(),
            self.dialect,
            classes=self.classes,
            background=self.background,
            image_size=(height, width) if self.stride > 1 else None,
        )
        self.written += 1

    def close(self) -> None:
        """Every file is whole already."""

    def told(self) -> str:
        return f"wrote {self.written}, {self.size // max(self.written, 1)} bytes per image"


@dataclass
class _CocoFile:
    """One JSON file for all images."""

    path: Path
    classes: "ClassList"
    background: float
    names: list[str]
    written: int = 0
    size: int = 0

    def __post_init__(self) -> None:
        from datamodules.seed_files.coco_writing import CocoWriter

        self.writer = CocoWriter(self.path, self.classes, self.background, self.names)

    def write(self, name: str, seed: "Seed") -> None:
        self.writer.write(name, seed.class_ids, seed.scores.numpy())
        self.written += 1

    def close(self) -> None:
        self.size = self.writer.close()

    def told(self) -> str:
        each = self.size // max(self.written, 1)
        return f"wrote {self.written} into {self.path.name}, {each} bytes per image"


def _target(
    folder: Path,
    dialect: TargetDialect,
    classes: "ClassList",
    background: float | None,
    stride: int,
    names: list[str],
) -> _Target:
    if dialect == "coco":
        # Never None here: `_check` has refused that.
        return _CocoFile(folder / COCO_FILE, classes, background or 0.0, names)
    return _Files(folder, dialect, len(classes), background, stride)


def _convert_all(names: list[str], read: Callable[[str], "Seed"], target: _Target) -> int:
    from g4seg_pl.types import BadItemError

    outcome: Counter[bool] = Counter()
    for name in names:
        try:
            target.write(name, read(name))
            outcome[True] += 1
        except (BadItemError, OSError, ValueError) as error:
            print(f"skipped {error}")
            outcome[False] += 1
    target.close()
    print(f"converted {outcome[True]}, skipped {outcome[False]}")
    return 0 if outcome[True] and not outcome[False] else 1
