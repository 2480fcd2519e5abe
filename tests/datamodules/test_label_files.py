"""Files of image-level labels: what their arrays count, and how they name images."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from datamodules.classes import read_class_list
from datamodules.labels import FileLabels
from g4seg_pl.types import ConfigurationError


def hot(length: int, *places: int) -> NDArray[np.float32]:
    array = np.zeros(length, np.float32)
    array[[*places]] = 1
    return array


def save(path: Path, content: dict[str, NDArray[np.float32]]) -> Path:
    np.save(path, content, allow_pickle=True)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("classes", "arrays", "said"),
    [
        ("voc", [hot(21, 3)], "arrays of 21 values for a class list of 20"),
        ("voc", [hot(80, 3)], "arrays of 80 values for a class list of 20"),
        ("voc", [hot(90, 3)], "arrays of 90 values for a class list of 20"),
        ("voc", [hot(20, 3), hot(19, 3)], "arrays of 19 and 20 values for a class list of 20"),
        ("coco", [hot(20, 3)], "arrays of 20 values for a class list of 80"),
        ("coco", [hot(80, 3), hot(90, 3)], "arrays of 80 and 90 values for a class list of 80"),
        ("coco", [hot(90, 3), hot(91, 3)], "arrays of 90 and 91 values for a class list of 80"),
    ],
)
def test_arrays_of_other_classes_than_the_lists_are_refused(
    classes: str, arrays: list[NDArray[np.float32]], said: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "cls_labels.npy", dict(zip("ab", arrays, strict=False)))
    with pytest.raises(ConfigurationError, match=rf"labels: .*cls_labels\.npy: one-hot {said}"):
        FileLabels(path, read_class_list(classes))


@pytest.mark.parametrize(
    ("length", "places"),
    [(80, (0, 11, 79)), (90, (0, 12, 89)), (91, (1, 13, 90))],
)
def test_cocos_labels_are_counted_in_classes_or_category_ids(
    length: int, places: tuple[int, ...], tmp_path: Path
) -> None:
    classes = read_class_list("coco")
    path = save(
        tmp_path / "cls_labels.npy", {"a": hot(length, *places), "b": hot(length, places[1])}
    )
    labels = FileLabels(path, classes)
    assert labels.read("a") == (1, 12, 80)
    assert [classes.names[class_id - 1] for class_id in labels.read("b")] == ["stop sign"]


@pytest.mark.parametrize(("length", "place", "number"), [(90, 11, 12), (91, 12, 12), (91, 0, 0)])
def test_category_ids_that_coco_leaves_out_are_named(
    length: int, place: int, number: int, tmp_path: Path
) -> None:
    path = save(tmp_path / "cls_labels.npy", {"a": hot(length, 1), "b": hot(length, place)})
    with pytest.raises(ConfigurationError, match=rf"image b has category ids \[{number}\]"):
        FileLabels(path, read_class_list("coco"))


@pytest.mark.parametrize("suffix", ["", ".jpg", ".JPG", ".jpeg", ".png"])
@pytest.mark.parametrize("kind", ["npy", "ids", "names"])
def test_ids_may_be_file_names(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / ("labels.npy" if kind == "npy" else "labels.txt")
    key = f"2007_000032{suffix}"
    if kind == "npy":
        save(path, {key: hot(20, 14)})
    else:
        path.write_text(f"{key} {14 if kind == 'ids' else 'person'}\nv1.5_photo 3\n")
    labels = FileLabels(path, read_class_list("voc"))
    assert labels.read("2007_000032") == (15,)
    if kind != "npy":
        assert labels.read("v1.5_photo") == (4,)


def test_only_what_is_above_zero_is_there(tmp_path: Path) -> None:
    """Some files have -1 for a class that is not there, or that nobody looked for."""
    array = np.full(20, -1, np.float32)
    array[[2, 14]], array[5] = 1, 0
    labels = FileLabels(save(tmp_path / "labels.npy", {"a": array}), read_class_list("voc"))
    assert labels.read("a") == (3, 15)
