"""SEAM, MCTformer, WeakTr: one entry per class, `{class id: (H, W)}`.

Class activation maps have 0-based ids and no background (`seam`); `out_crf` files have the
background at 0 and classes from 1 (`seam_crf`); WeakTr's second phase writes `{prob, keys}` with
label values as keys (`weaktr`, OnlineRetraining/segm/eval/make_crf.py).
"""

from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import bad_item
from datamodules.files import File
from datamodules.seed_files.maps import SeedMaps, as_array, as_ids, as_maps
from g4seg_pl.types import RANGE_TOLERANCE

MAPS_REACH = 0.99
"""Activation maps are divided by their maximum per class, so each one reaches 1."""


def matches(content: Mapping[object, object]) -> bool:
    """Whether every key of a dictionary is a class id."""
    return bool(content) and all(isinstance(key, int | np.integer) for key in content)


def matches_weaktr(content: Mapping[object, object]) -> bool:
    """Whether a dictionary is of WeakTr's second phase."""
    return "keys" in content and "prob" in content


def _stack(content: Mapping[object, object], path: File) -> NDArray[np.floating[Any]]:
    arrays = [as_array(value, path, f"entry {key}") for key, value in content.items()]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise bad_item(path, f"entries of several shapes {shapes}", "Make this seed again")
    return as_maps(np.stack(arrays) if arrays else np.empty((0, 1, 1)), path, "the stacked maps")


def has_background(content: Mapping[object, object], path: File) -> bool:
    """Whether entry 0 is the background; decided by the values, since ids alone do not tell.

    After dCRF all entries together sum to one at every pixel; activation maps each reach one.

    Raises:
        BadItemError: neither holds, so that entry 0 may be the background or the first class.
    """
    if 0 not in content:
        return False
    maps = _stack(content, path).astype(np.float32)
    sums_to_one = bool(np.abs(maps.sum(axis=0) - 1).max(initial=0.0) < 0.01)
    each_reaches_one = bool((maps.max(axis=(1, 2), initial=0.0) >= MAPS_REACH).all())
    if len(maps) > 1 and sums_to_one:
        return True
    if each_reaches_one:
        return False
    problem = "entry 0 may be the background (out_crf) or the first class (activation maps)"
    raise bad_item(path, problem, "Say which by dialect=seam_crf or dialect=seam")


def read(content: Mapping[object, object], path: File, *, background: bool) -> SeedMaps:
    """Reads the dictionary.

    Args:
        content: maps by class id.
        path: the file, for errors.
        background: entry 0 is the background, which is left out, and classes count from 1.
    """
    kept = {key: value for key, value in content.items() if not (background and key == 0)}
    ids = as_ids(list(kept), path, "class ids", first=1 if background else 0)
    maps = _stack(kept, path)
    if background:
        return SeedMaps("seam_crf", ids, maps)
    # SEAM sets the places below a map's minimum to 0 and subtracts the minimum all the same, which
    # leaves them below 0; only a map that reaches 1 as its do is taken for one of these.
    reaches_one = maps.max(axis=(1, 2), initial=0.0, keepdims=True) >= MAPS_REACH
    return SeedMaps("seam", ids, np.where(reaches_one, np.maximum(maps, 0), maps))


def read_weaktr(content: Mapping[object, object], path: File) -> SeedMaps:
    """Reads WeakTr's second phase; the map with key 0, the background, is left out.

    Its two decoders' probabilities lie in the file added up with their weights (1 and 0.8 as its
    README runs it), so that they sum to more than one at a pixel; they are divided by that sum.
    """
    ids = as_ids(content["keys"], path, "keys", first=1)
    maps = as_maps(content["prob"], path, "prob")
    if len(ids) != len(maps):
        raise bad_item(path, f"{len(ids)} keys for {len(maps)} maps in prob", "Write it again")
    # Classes that the image does not have are left out of the file: the largest sum is the whole.
    whole = float(maps.sum(axis=0, dtype=np.float32).max(initial=0.0))
    if whole > 1 + RANGE_TOLERANCE:
        maps = maps / np.float32(whole)
    kept = [index for index, class_id in enumerate(ids) if class_id != 0]
    return SeedMaps("weaktr", tuple(ids[index] for index in kept), maps[kept])


def write(stream: BinaryIO, class_ids: tuple[int, ...], scores: NDArray[np.floating[Any]]) -> None:
    """Writes what the `evaluation.py` of SEAM, MCTformer and WeakTr reads.

    Args:
        stream: a file opened for writing bytes.
        class_ids: label values, 1-based.
        scores: probabilities ``(K, H, W)`` at the image's size.
    """
    maps = scores.astype(np.float16)
    content = {class_id - 1: maps[index] for index, class_id in enumerate(class_ids)}
    np.save(stream, content, allow_pickle=True)  # type: ignore[arg-type]


def write_crf(
    stream: BinaryIO, class_ids: tuple[int, ...], scores: NDArray[np.floating[Any]]
) -> None:
    """Writes an `out_crf` dictionary: background at 0, then classes, summing to one."""
    full = _with_background(scores)
    content = {class_id: full[index] for index, class_id in enumerate((0, *class_ids))}
    np.save(stream, content, allow_pickle=True)  # type: ignore[arg-type]


def write_weaktr(
    stream: BinaryIO, class_ids: tuple[int, ...], scores: NDArray[np.floating[Any]]
) -> None:
    """Writes WeakTr's second phase: `{prob: (K + 1, H, W), keys}`, the background at key 0."""
    keys = np.array((0, *class_ids), dtype=np.int64)
    content = {"prob": _with_background(scores), "keys": keys}
    np.save(stream, content, allow_pickle=True)  # type: ignore[arg-type]


def _with_background(scores: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """The background, what the strongest class leaves (1 - max), then all divided by their sum."""
    full = np.concatenate([1 - scores.max(axis=0, keepdims=True, initial=0.0), scores]).astype(
        np.float32
    )
    return np.asarray(full / full.sum(axis=0, keepdims=True), dtype=np.float16)
