"""`g4seg convert`: seeds of any dialect into any other."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

# Only typing here: the command line's help must not wait for NumPy and torch.
if TYPE_CHECKING:
    from datamodules.classes import ClassList
    from datamodules.labels import LabelSource
    from datamodules.seed_files.maps import ReadOptions
    from g4seg_pl.types import Seed

SourceDialect = Literal[
    "auto", "clip_es", "irn", "seam", "seam_crf", "weaktr", "mat", "png", "npz", "npy", "coco"
]
TargetDialect = Literal["clip_es", "irn", "seam", "seam_crf", "mat", "png", "npz", "npy"]


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
        to_dialect: dialect to write; `npz` is the smallest and says which classes it holds.
        class_names: class list, a file or the name of a bundled one.
        images: folder of the images. Sizes are compared with it; COCO JSON, and seeds stored
            smaller than their images (IRN's `cam`, reduced npz), cannot do without.
        labels: file of image-level labels, for plain arrays of present classes.
        background: score below which a pixel is background; writing `png` needs it.
        stride: writes maps smaller by this factor; `npz` only.
        options: what the seed files do not say themselves.

    Returns:
        Exit code: 0 if there are seeds and all were converted, 1 otherwise.

    Raises:
        ConfigurationError: a folder or file is missing, or the options do not fit the dialect.
    """
    from datamodules.classes import read_class_list
    from datamodules.labels import FileLabels

    _check(to_dialect, background, stride)
    classes = read_class_list(class_names)
    label_source = FileLabels(Path(labels), classes) if labels else None
    read = _reader(Path(in_dir), from_dialect, classes, images, options)
    write = partial(
        _write,
        Path(out_dir),
        to_dialect,
        classes=len(classes),
        background=background,
        stride=stride,
    )
    names = _names(Path(in_dir), images)
    return _convert_all(names, partial(_labelled, read, label_source), write, to_dialect)


def _check(to_dialect: TargetDialect, background: float | None, stride: int) -> None:
    from g4seg_pl.types import ConfigurationError

    if to_dialect == "png" and background is None:
        message = "background: None; a label image needs the score below which it is background"
        raise ConfigurationError(message)
    if stride < 1 or (stride > 1 and to_dialect != "npz"):
        message = f"stride: {stride} with {to_dialect}; only npz says that its maps are reduced"
        raise ConfigurationError(message)


def _names(source: Path, images: str | None) -> list[str]:
    """Image ids: the seed files of a folder; for a COCO JSON file, the images."""
    from datamodules.items import IMAGE_SUFFIXES
    from datamodules.seed_files.reading import SUFFIXES

    folder, suffixes = (
        (source, SUFFIXES) if source.is_dir() else (Path(images or ""), IMAGE_SUFFIXES)
    )
    return sorted({path.stem for path in folder.iterdir() if path.suffix in suffixes})


def _reader(
    source: Path,
    dialect: SourceDialect,
    classes: "ClassList",
    images: str | None,
    options: "ReadOptions | None",
) -> Callable[[str, tuple[int, ...] | None], "Seed"]:
    """Reads the seed of an id, at the size of its image or else at its own."""
    from datamodules.images import header_size
    from datamodules.items import find_image
    from datamodules.layout import first_folder
    from datamodules.seed_files.source import SeedFolder, open_seeds
    from g4seg_pl.types import ConfigurationError

    seeds = open_seeds(source, classes, dialect, options)
    if images is not None:
        folder = first_folder("images", [Path(images)])
        return lambda name, labels: seeds.read(name, header_size(find_image(folder, name)), labels)
    if isinstance(seeds, SeedFolder):
        return seeds.read_unsized
    message = f"images: None; {source} does not say how large its images are"
    raise ConfigurationError(message)


def _labelled(
    read: Callable[[str, tuple[int, ...] | None], "Seed"],
    labels: "LabelSource | None",
    name: str,
) -> "Seed":
    return read(name, labels.read(name) if labels else None)


def _write(
    folder: Path,
    dialect: TargetDialect,
    name: str,
    seed: "Seed",
    *,
    classes: int,
    background: float | None,
    stride: int,
) -> int:
    """Writes one seed; returns the bytes."""
    from torch.nn.functional import interpolate

    from datamodules.seed_files.writing import suffix, write_seed

    scores, height, width = seed.scores, seed.scores.shape[1], seed.scores.shape[2]
    if stride > 1:
        size = (-(-height // stride), -(-width // stride))
        scores = interpolate(scores[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    return write_seed(
        folder / f"{name}{suffix(dialect)}",
        seed.class_ids,
        scores.numpy(),
        dialect,
        classes=classes,
        background=background,
        image_size=(height, width) if stride > 1 else None,
    )


def _convert_all(
    names: list[str],
    read: Callable[[str], "Seed"],
    write: Callable[[str, "Seed"], int],
    dialect: str,
) -> int:
    from g4seg_pl.types import BadItemError

    written: list[int] = []
    for name in names:
        try:
            written.append(write(name, read(name)))
        except (BadItemError, OSError, ValueError) as error:
            print(f"skipped {error}")
    skipped = len(names) - len(written)
    each = sum(written) // max(len(written), 1)
    print(f"converted {len(written)}, skipped {skipped}, {each} bytes per image as {dialect}")
    return 0 if written and not skipped else 1
