"""Detecting the dialect of a seed file and reading it into a checked `Seed`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import interpolate

from datamodules.errors import bad_item
from datamodules.files import File
from datamodules.images import check_size
from datamodules.npy import read_npy, read_npz
from datamodules.seed_files import arrays, clip_es, diffsegmenter_mat, irn, label_png, seam
from datamodules.seed_files.maps import (
    COCO_CLASSES,
    Dialect,
    Empty,
    ReadOptions,
    SeedMaps,
    check_classes,
    check_scores,
    to_contiguous,
)
from g4seg_pl.types import Seed

SUFFIXES = (".npy", ".npz", ".png", ".mat")


def _load(path: File) -> object:
    """The content of a NumPy file; None for the other formats."""
    match path.suffix.lower():
        case ".npy":
            return read_npy(path)
        case ".npz":
            content = read_npz(path)
            return next(iter(content.values())) if len(content) == 1 else content
        case ".png" | ".mat":
            return None
    problem = f"suffix {path.suffix!r}"
    raise bad_item(path, problem, f"Seed files end with {', '.join(SUFFIXES)}")


def _candidates(content: Mapping[object, object]) -> list[Dialect]:
    """Every dialect whose fields a dictionary has."""
    tests: dict[Dialect, bool] = {
        "clip_es": clip_es.matches(content),
        "irn": irn.matches(content),
        "weaktr": seam.matches_weaktr(content),
        "seam": seam.matches(content),
        "npz": arrays.matches(content),
    }
    return [dialect for dialect, found in tests.items() if found]


def _detect(content: object, path: File) -> Dialect:
    if path.suffix.lower() in (".png", ".mat"):
        return "png" if path.suffix.lower() == ".png" else "mat"
    if not isinstance(content, Mapping):
        return "npz" if path.suffix.lower() == ".npz" else "npy"
    found = _candidates(content)
    if len(found) != 1:
        fields = ", ".join(str(key)[:20] for key in list(content)[:8]) or "no fields"
        if found:
            problem = f"it has {fields}: {' and '.join(found)}"
            raise bad_item(path, problem, "Force one with dialect=...")
        problem = f"it has {fields}: no known dialect"
        remedy = "Save its maps as npz, class_ids and foreground (docs/sources.md, last section)"
        raise bad_item(path, problem, remedy)
    if found == ["seam"] and seam.has_background(content, path):
        return "seam_crf"
    return found[0]


def detect(path: File) -> Dialect:
    """The dialect of a seed file, from its suffix and content.

    Raises:
        BadItemError: the file cannot be read, fits no dialect, or fits several.
    """
    return _detect(_load(path), path)


def _fields(content: object, path: File, dialect: Dialect) -> Mapping[object, object]:
    """The dictionary that a dialect needs; BadItemError if the file holds something else."""
    expected = "seam" if dialect == "seam_crf" else dialect
    if isinstance(content, Mapping) and expected in _candidates(content):
        return content
    problem = f"it is not of dialect {dialect}"
    raise bad_item(path, problem, "Set dialect=auto, or the dialect it is written in")


def read_maps(
    path: File,
    classes: int,
    dialect: Dialect | Literal["auto"] = "auto",
    labels: tuple[int, ...] | None = None,
    options: ReadOptions | None = None,
) -> SeedMaps:
    """Reads a seed file, without comparing it with its image.

    Args:
        path: the file.
        classes: number of foreground classes of the data set.
        dialect: forces one; `auto` detects it.
        labels: label values known to be in the image (for plain arrays of present classes).
        options: what the file does not say itself.

    Raises:
        BadItemError: unreadable, ambiguous, of another dialect, or with wrong class ids.
    """
    options = options or ReadOptions()
    content = _load(path)
    if dialect == "auto":
        dialect = _detect(content, path)
    maps = _read(content, path, dialect, classes, labels, options)
    if maps.dialect == "weaktr" and classes == COCO_CLASSES and options.category_ids is None:
        problem = (
            "its class ids may be COCO's category ids (WeakTr's own) or label values (g4seg's)"
        )
        raise bad_item(path, problem, "Say which by category_ids=coco91 or category_ids=contiguous")
    if options.category_ids == "coco91":
        maps = replace(maps, class_ids=to_contiguous(maps.class_ids, path))
    check_classes(maps, path, classes, options.empty)
    return maps


def _read(
    content: object,
    path: File,
    dialect: Dialect,
    classes: int,
    labels: tuple[int, ...] | None,
    options: ReadOptions,
) -> SeedMaps:
    check_suffix(path, dialect)
    if dialect == "mat":
        return diffsegmenter_mat.read(path)
    if dialect == "png":
        return label_png.read(path, classes, options)
    if dialect in ("npy", "npz") and not isinstance(content, Mapping):
        return arrays.read(content, path, classes, labels, options)
    return _read_fields(_fields(content, path, dialect), path, dialect)


def _read_fields(content: Mapping[object, object], path: File, dialect: Dialect) -> SeedMaps:
    match dialect:
        case "clip_es":
            return clip_es.read(content, path)
        case "irn":
            return irn.read(content, path)
        case "weaktr":
            return seam.read_weaktr(content, path)
        case "seam" | "seam_crf":
            return seam.read(content, path, background=dialect == "seam_crf")
        case _:
            return arrays.read_named(content, path)


def suffixes_of(dialect: Dialect) -> tuple[str, ...]:
    """The suffixes of files that can be of a dialect."""
    match dialect:
        case "png" | "mat" | "npy" | "npz":
            return (f".{dialect}",)
        case "coco":
            return (".json",)
        case _:
            return (".npy", ".npz")


def check_suffix(path: File, dialect: Dialect) -> None:
    """Raises BadItemError if a file of this name cannot be of the dialect."""
    if path.suffix.lower() not in suffixes_of(dialect):
        problem = f"a {path.suffix} file where dialect={dialect} was asked for"
        raise bad_item(path, problem, "Set dialect=auto, or point seeds to the right folder")


def select(
    maps: SeedMaps, labels: tuple[int, ...] | None, path: File, empty: Empty = "refuse"
) -> SeedMaps:
    """Keeps the classes that are labelled in the image; all of them without labels.

    A labelled class that the seed lacks stays absent, as it is in masks made by an argmax.

    Raises:
        BadItemError: none is left, unless `empty` keeps that.
    """
    if labels is None:
        return maps
    kept = [index for index, class_id in enumerate(maps.class_ids) if class_id in labels]
    if not kept and empty == "refuse":
        problem = f"label values {maps.class_ids}, but the image is labelled {labels}"
        raise bad_item(path, problem, "Check the labels, or set labels=seed")
    ids = tuple(maps.class_ids[index] for index in kept)
    return replace(maps, class_ids=ids, maps=maps.maps[kept])


def to_seed(maps: SeedMaps, size: tuple[int, int], path: File, empty: Empty = "refuse") -> Seed:
    """Checks maps against their image and makes a `Seed` of its size.

    Args:
        maps: as read.
        size: height and width of the image.
        path: the file, for errors.
        empty: whether a map may be nowhere above 0, see `ReadOptions`.

    Raises:
        BadItemError: another size, scores outside [0, 1], or an empty map that is refused.
    """
    check_scores(maps, path, empty)
    if maps.image_size is not None:
        check_size(path, "image_size", maps.image_size, size, "Make the seed of this image")
    if not maps.class_ids:
        return Seed((), torch.zeros(0, *size))  # maps of no class have no size of their own
    scores = torch.from_numpy(np.array(maps.maps, dtype=np.float32, order="C"))
    if maps.resizable and tuple(scores.shape[1:]) != size:
        scores = interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
    found = (scores.shape[1], scores.shape[2])
    remedy = "Make the seed at the image's size; only IRN's cam and npz with image_size are resized"
    check_size(path, "seed", found, size, remedy)
    return Seed(maps.class_ids, scores.clamp(0, 1))


def read_seed(
    path: File,
    size: tuple[int, int],
    classes: int,
    dialect: Dialect | Literal["auto"] = "auto",
    labels: tuple[int, ...] | None = None,
    options: ReadOptions | None = None,
) -> Seed:
    """Reads a seed file of any dialect for an image.

    Args:
        path: the file.
        size: height and width of the image.
        classes: number of foreground classes of the data set.
        dialect: forces one; `auto` detects it.
        labels: label values to keep; None keeps those of the file.
        options: what the file does not say itself.

    Raises:
        BadItemError: unreadable, ambiguous, of another size, NaN, out of range, without classes,
            with an unknown class or an empty map (see `ReadOptions.empty`).
    """
    options = options or ReadOptions()
    maps = read_maps(path, classes, dialect, labels, options)
    return to_seed(select(maps, labels, path, options.empty), size, path, options.empty)
