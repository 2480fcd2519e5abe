"""Writing seeds in the dialects that other projects read, whole or not at all."""

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from datamodules.seed_files import arrays, clip_es, diffsegmenter_mat, irn, label_png, seam

WritableDialect = Literal[
    "clip_es", "irn", "seam", "seam_crf", "weaktr", "mat", "png", "npz", "npy"
]
WRITABLE: tuple[WritableDialect, ...] = get_args(WritableDialect)

_PLAIN: dict[str, Callable[[BinaryIO, tuple[int, ...], NDArray[np.floating[Any]]], None]] = {
    "clip_es": clip_es.write,
    "irn": irn.write,
    "seam": seam.write,
    "seam_crf": seam.write_crf,
    "weaktr": seam.write_weaktr,
    "mat": diffsegmenter_mat.write,
}
"""Dialects that need nothing but classes and maps."""


def suffix(dialect: WritableDialect) -> str:
    """The suffix of a dialect's files, with the dot."""
    match dialect:
        case "mat" | "png" | "npz":
            return f".{dialect}"
        case _:
            return ".npy"


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> int:
    """Writes a file under a temporary name beside it and renames it; an interruption leaves none.

    Args:
        path: the file; its folder is made.
        write: writes the content into an open file.

    Returns:
        The number of bytes written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of fixed length: an id may be as long as a name may be.
    short = blake2b(path.name.encode(), digest_size=8).hexdigest()
    temporary = path.with_name(f".{short}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            size = stream.tell()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def write_seed(
    path: Path,
    class_ids: tuple[int, ...],
    scores: NDArray[np.floating[Any]],
    dialect: WritableDialect,
    *,
    classes: int | None = None,
    background: float | None = None,
    image_size: tuple[int, int] | None = None,
) -> int:
    """Writes the maps of one image, present classes only and in float16 where the dialect allows.

    Args:
        path: the file, with the suffix of the dialect.
        class_ids: label values, 1-based.
        scores: probabilities ``(K, H, W)``.
        dialect: the dialect to write.
        classes: number of classes of the data set, needed by `npy`.
        background: score below which a pixel is background, needed by `png`.
        image_size: height and width of the image where the maps are smaller; `npz` only.

    Returns:
        The number of bytes written.

    Raises:
        ValueError: the dialect needs `classes` or `background` and has not got it.
    """

    def write(stream: BinaryIO) -> None:
        match dialect:
            case "npz":
                arrays.write_npz(stream, class_ids, scores, image_size)
            case "npy":
                total = _needed(classes, "classes", dialect)
                arrays.write_npy(stream, class_ids, scores, int(total))
            case "png":
                threshold = _needed(background, "background", dialect)
                label_png.write(stream, label_png.label_from_scores(class_ids, scores, threshold))
            case _:
                _PLAIN[dialect](stream, class_ids, scores)

    return write_atomically(path, write)


def _needed(value: float | None, name: str, dialect: str) -> float:
    if value is None:
        message = f"{name}: writing {dialect} needs it, got None"
        raise ValueError(message)
    return value
