"""What every dialect is read into, the options of reading, and the checks all of them share."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import bad_item
from datamodules.files import File
from g4seg_pl.types import RANGE_TOLERANCE, BadItemError

Dialect = Literal[
    "clip_es", "irn", "seam", "seam_crf", "weaktr", "mat", "png", "npz", "npy", "coco"
]
Channels = Literal["auto", "all", "background+all", "present", "background+present"]
Activation = Literal["none", "softmax", "sigmoid", "byte"]
CategoryIds = Literal["contiguous", "coco91"]
Empty = Literal["refuse", "keep"]

_KEEP = "set seed_options.empty to keep if nothing was found there"

COCO_CATEGORY_IDS = tuple(
    number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
)
"""COCO numbers its 80 things from 1 to 90 with holes; the n-th of these is label value n."""
COCO_CLASSES = len(COCO_CATEGORY_IDS)


@dataclass(frozen=True)
class ReadOptions:
    """How seed files are to be understood where they do not say it themselves.

    Attributes:
        channels: which classes the channels of a plain array are; `auto` goes by their number.
        activation: how the numbers of a plain array become probabilities. `byte` divides by 255.
        label_offset: subtracted from the values of label images: 91 for MCTformer's COCO labels,
            -1 for labels that start at 0 without a background (ADE20K and NightCity as trained
            on). 255 stays "ignored".
        ignored_score: score, for every class of the image, of a pixel labelled 255.
        present_at: where nothing says which classes are in the image, those whose highest score
            reaches this are taken, and those that are the best of all somewhere if the file has
            the background among them.
        category_ids: `coco91` if class ids are COCO's category ids (1 to 90) and not label
            values (1 to 80). COCO JSON without category names needs it said, and so do WeakTr's
            files where the class list has 80 classes.
        empty: what a seed without any class, or with a map that is nowhere above 0, is: `refuse`
            takes it for a mistake; `keep` for an image, or a class, of which nothing was found, as
            open-vocabulary seeds have them. Their pixels are background and count in scores.
    """

    channels: Channels = "auto"
    activation: Activation = "none"
    label_offset: int = 0
    ignored_score: float = 0.0
    present_at: float = 0.5
    category_ids: CategoryIds | None = None
    empty: Empty = "refuse"


@dataclass(frozen=True)
class SeedMaps:
    """A seed file as read, not yet compared with its image.

    Attributes:
        dialect: the dialect it was read in.
        class_ids: label values, 1-based, one per map.
        maps: foreground scores ``(K, h, w)``, floating point.
        resizable: the dialect stores maps smaller than the image, which are resized to it.
        image_size: height and width of the image, where the file says them.
        plain: a plain array, whose numbers `ReadOptions.activation` explains.
    """

    dialect: Dialect
    class_ids: tuple[int, ...]
    maps: NDArray[np.floating[Any]]
    resizable: bool = False
    image_size: tuple[int, int] | None = None
    plain: bool = False


def as_array(value: object, path: File, field: str) -> NDArray[Any]:
    """A field of a file as an array of numbers, or an error that names both."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind in "biuf":
        return array
    problem = f"{field} is not an array of numbers but {type(value).__name__}"
    raise bad_item(path, problem, "Write the seed of this image again")


def as_maps(value: object, path: File, field: str) -> NDArray[np.floating[Any]]:
    """A field as maps ``(K, h, w)`` of finite floating-point numbers."""
    array = as_array(value, path, field)
    if array.ndim != 3:
        problem = f"{field} has shape {array.shape}, expected (classes, height, width)"
        raise bad_item(path, problem, "Write one map per class")
    if array.dtype.kind != "f":
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        problem = f"{field} has {count} values that are NaN or infinite"
        raise bad_item(path, problem, "Make the seed of this image again")
    return cast("NDArray[np.floating[Any]]", array)


def as_ids(value: object, path: File, field: str, first: int) -> tuple[int, ...]:
    """A field as label values, from ids that start at `first` for the first class.

    Args:
        value: a one-dimensional array or list of whole numbers.
        path: the file, for errors.
        field: name of the field, for errors.
        first: id of the first foreground class in this dialect: 0 or 1.
    """
    array = as_array(value, path, field).reshape(-1)
    if array.dtype.kind not in "iu" and not np.array_equal(array, np.floor(array)):
        raise bad_item(path, f"{field} has fractional class ids {array[:5]}", "Write whole numbers")
    return tuple(int(number) - first + 1 for number in array)


def to_contiguous(class_ids: tuple[int, ...], path: File) -> tuple[int, ...]:
    """Label values 1 to 80 for COCO category ids 1 to 90."""
    unknown = [number for number in class_ids if number not in COCO_CATEGORY_IDS]
    if unknown:
        problem = f"class ids {unknown} are not category ids of COCO's 80 things"
        raise bad_item(path, problem, "Set category_ids to contiguous if these are label values")
    return tuple(COCO_CATEGORY_IDS.index(number) + 1 for number in class_ids)


def check_classes(maps: SeedMaps, path: File, classes: int, empty: Empty) -> None:
    """Checks number, range and uniqueness of the class ids.

    Raises:
        BadItemError: no class (unless `empty` keeps that), a class id beyond `classes`, one twice,
            or ids and maps that differ in number.
    """
    ids = maps.class_ids
    if not ids and empty == "refuse":
        remedy = f"Leave the image out, make its seed again, or {_KEEP}"
        raise bad_item(path, "it has no class", remedy)
    if len(ids) != len(maps.maps):
        problem = f"{len(ids)} class ids for {len(maps.maps)} maps"
        raise bad_item(path, problem, "Make the seed of this image again")
    if unknown := [number for number in ids if not 1 <= number <= classes]:
        raise _unknown(path, unknown, classes)
    if len(set(ids)) < len(ids):
        raise bad_item(path, f"a class twice in {ids}", "Keep one map per class")


def _unknown(path: File, unknown: Collection[int], classes: int) -> BadItemError:
    problem = f"label values {list(unknown)} are outside 1 to {classes}, the classes of the list"
    remedy = (
        "Check class_names; labels written with an offset need label_offset, COCO's category ids "
        "need category_ids=coco91"
    )
    return bad_item(path, problem, remedy)


def check_scores(maps: SeedMaps, path: File, empty: Empty) -> None:
    """Checks that scores are probabilities and that no map is empty.

    Raises:
        BadItemError: a score outside [0, 1], or a map without any positive score, unless `empty`
            keeps that.
    """
    low, high = float(maps.maps.min(initial=0.0)), float(maps.maps.max(initial=0.0))
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        remedy = (
            "Set activation to softmax or sigmoid for logits, to byte for 0 to 255"
            if maps.plain
            else f"Write probabilities into it: as {maps.dialect}, scores are read as they are"
        )
        raise bad_item(path, f"scores range from {low:.4g} to {high:.4g}, not 0 to 1", remedy)
    peaks = maps.maps.max(axis=(1, 2), initial=0.0)
    lacking = [i for i, peak in zip(maps.class_ids, peaks, strict=True) if peak <= 0]
    if lacking and empty == "refuse":
        problem = f"the maps of label values {lacking} are empty (nowhere above 0)"
        remedy = f"Leave these classes out of the seed, make it again, or {_KEEP}"
        raise bad_item(path, problem, remedy)
