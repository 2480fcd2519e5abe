"""Plain arrays: `.npy` or `.npz` of ``(C, H, W)`` probabilities or logits.

An `.npz` may say which classes it holds: `{class_ids: label values, foreground: (K, h, w)}`, the
dialect `npz` writes, and `image_size: (H, W)` where the maps are stored smaller than the image.
"""

from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import bad_item
from datamodules.files import File
from datamodules.seed_files.maps import (
    Activation,
    Dialect,
    ReadOptions,
    SeedMaps,
    as_array,
    as_ids,
    as_maps,
)


def matches(content: Mapping[object, object]) -> bool:
    """Whether an archive says which classes it holds."""
    return "class_ids" in content and "foreground" in content


def read_named(content: Mapping[object, object], path: File) -> SeedMaps:
    """Reads an archive with `class_ids` and `foreground`.

    Raises:
        BadItemError: a field cannot be what it is called.
    """
    ids = as_ids(content["class_ids"], path, "class_ids", first=1)
    maps = as_maps(content["foreground"], path, "foreground")
    size = _image_size(content["image_size"], path) if "image_size" in content else None
    return SeedMaps("npz", ids, maps, resizable=size is not None, image_size=size)


def _image_size(value: object, path: File) -> tuple[int, int]:
    """Height and width, as `write_npz` writes them."""
    sides = as_array(value, path, "image_size")
    if sides.shape != (2,) or sides.dtype.kind not in "iu" or sides.min() < 1:
        raise bad_item(path, f"image_size is {sides.tolist()}", "Write height and width in pixels")
    return int(sides[0]), int(sides[1])


def _layouts(
    count: int, classes: int, labels: tuple[int, ...] | None, options: ReadOptions
) -> list[tuple[int, ...]]:
    """Every reading of `count` channels, as label values with 0 for the background."""
    every, present = tuple(range(1, classes + 1)), tuple(sorted(labels or ()))
    layouts = {
        "all": every,
        "background+all": (0, *every),
        "present": present,
        "background+present": (0, *present) if present else (),
    }
    if options.channels != "auto":
        layouts = {options.channels: layouts[options.channels]}
    # Equal readings (one class: "all" and "present") are one reading.
    return list({ids: None for ids in layouts.values() if len(ids) == count})


def _activate(maps: NDArray[np.floating[Any]], activation: Activation) -> NDArray[np.floating[Any]]:
    """Probabilities from raw channels; softmax runs over all of them, background included."""
    match activation:
        case "none":
            return maps
        case "byte":
            return maps.astype(np.float32) / 255
        case "sigmoid":
            # Through tanh, which does not overflow.
            return np.asarray(0.5 * (1 + np.tanh(0.5 * maps.astype(np.float32))))
        case "softmax":
            exponent = np.exp(maps.astype(np.float32) - maps.max(axis=0, keepdims=True))
            return np.asarray(exponent / exponent.sum(axis=0, keepdims=True))


def read(
    content: object,
    path: File,
    classes: int,
    labels: tuple[int, ...] | None,
    options: ReadOptions,
) -> SeedMaps:
    """Reads a plain array.

    Args:
        content: the array.
        path: the file, for errors.
        classes: number of foreground classes of the data set.
        labels: label values known to be in the image; channels of a present-classes array are
            taken in ascending order of them.
        options: `channels`, `activation` and, without labels, `present_at`.

    Raises:
        BadItemError: the number of channels fits no reading, or more than one.
    """
    maps = as_maps(content, path, "the array")
    layouts = _layouts(len(maps), classes, labels, options)
    if len(layouts) != 1:
        fit = "fits several readings" if layouts else "fits no reading"
        known = "unknown" if labels is None else f"{len(labels)}"
        problem = f"{len(maps)} channels: {fit} ({classes} classes, in this image: {known})"
        raise bad_item(path, problem, "Set channels, give labels, or check class_names")
    ids = np.array(layouts[0])
    maps = _activate(maps, options.activation)
    kept = ids > 0
    if labels is None:
        shown = maps.max(axis=(1, 2), initial=0.0) >= options.present_at
        if 0 in ids:
            shown[np.unique(maps.argmax(axis=0))] = True
        kept &= shown
    dialect: Dialect = "npz" if path.suffix.lower() == ".npz" else "npy"
    return SeedMaps(dialect, tuple(int(number) for number in ids[kept]), maps[kept], plain=True)


def write_npz(
    stream: BinaryIO,
    class_ids: tuple[int, ...],
    scores: NDArray[np.floating[Any]],
    image_size: tuple[int, int] | None = None,
) -> None:
    """Writes present classes with their ids, compressed float16.

    Args:
        stream: a file opened for writing bytes.
        class_ids: label values, 1-based.
        scores: probabilities ``(K, h, w)``.
        image_size: height and width of the image if the maps are smaller than it.
    """
    fields = {
        "class_ids": np.array(class_ids, dtype=np.int64),
        "foreground": scores.astype(np.float16),
    }
    if image_size is not None:
        fields["image_size"] = np.array(image_size, dtype=np.int64)
    np.savez_compressed(stream, **fields)  # type: ignore[arg-type]


def write_npy(
    stream: BinaryIO, class_ids: tuple[int, ...], scores: NDArray[np.floating[Any]], classes: int
) -> None:
    """Writes all classes ``(classes, H, W)`` as float16, absent ones zero, without background."""
    full = np.zeros((classes, *scores.shape[1:]), dtype=np.float16)
    full[np.array(class_ids, dtype=np.intp) - 1] = scores
    np.save(stream, full)
