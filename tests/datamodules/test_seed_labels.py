"""Seeds as label images and as COCO JSON."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from seed_dialects import CLASSES, IDS, SIZE

from datamodules.classes import read_class_list
from datamodules.seed_files import (
    ReadOptions,
    detect,
    open_seeds,
    read_seed,
    write_seed,
)
from datamodules.seed_files.label_png import palette
from g4seg_pl.types import BadItemError, ConfigurationError


def label_image(path: Path, values: NDArray[np.uint8], mode: str = "L") -> Path:
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette(palette())
    image.save(path)
    return path


@pytest.mark.parametrize("mode", ["P", "L"])
def test_label_images(mode: str, tmp_path: Path) -> None:
    values = np.zeros(SIZE, np.uint8)
    values[2:5, 2:9], values[7:, 3:], values[0] = 3, 15, 255
    path = label_image(tmp_path / "a.png", values, mode)
    assert detect(path) == "png"
    seed = read_seed(path, SIZE, CLASSES)
    assert seed.class_ids == IDS
    for class_id, score in zip(seed.class_ids, seed.scores, strict=True):
        np.testing.assert_array_equal(score.numpy(), values == class_id)
    half = read_seed(path, SIZE, CLASSES, options=ReadOptions(ignored_score=0.5))
    assert (half.scores[:, 0] == 0.5).all()


def test_label_offsets(tmp_path: Path) -> None:
    values = np.full(SIZE, 91, np.uint8)
    values[3:], values[0] = 91 + 80, 255
    path = label_image(tmp_path / "a.png", values)
    with pytest.raises(BadItemError, match="label_offset"):
        read_seed(path, SIZE, 80)
    assert read_seed(path, SIZE, 80, options=ReadOptions(label_offset=91)).class_ids == (80,)
    with pytest.raises(BadItemError, match="below the offset"):
        read_seed(path, SIZE, 80, options=ReadOptions(label_offset=92))
    train_ids = label_image(tmp_path / "b.png", (values == 91 + 80).astype(np.uint8) * 18)
    assert read_seed(train_ids, SIZE, 19, options=ReadOptions(label_offset=-1)).class_ids == (1, 19)


def test_coco_category_ids(tmp_path: Path) -> None:
    values = np.zeros(SIZE, np.uint8)
    values[3:], values[:2] = 90, 13
    path = label_image(tmp_path / "a.png", values)
    seed = read_seed(path, SIZE, 80, options=ReadOptions(category_ids="coco91"))
    names = read_class_list("coco").names
    assert [names[class_id - 1] for class_id in seed.class_ids] == ["stop sign", "toothbrush"]
    values[:2] = 12
    with pytest.raises(BadItemError, match=r"\[12\]"):
        read_seed(label_image(path, values), SIZE, 80, options=ReadOptions(category_ids="coco91"))


def test_sixteen_bit_labels_of_459_classes(tmp_path: Path) -> None:
    """Label 255 is a class there and 65535 is ignored; written and read without loss."""
    values = np.zeros(SIZE, np.uint16)
    values[2:5], values[5:9], values[9:], values[0] = 59, 255, 459, 65535
    Image.fromarray(values).save(tmp_path / "a.png")
    seed = read_seed(tmp_path / "a.png", SIZE, 459)
    names = read_class_list("context459").names
    assert seed.class_ids == (59, 255, 459)
    assert [names[class_id - 1] for class_id in seed.class_ids] == ["car", "money", "wool"]
    assert write_seed(
        tmp_path / "b.png", seed.class_ids, seed.scores.numpy(), "png", background=0.5
    )
    with Image.open(tmp_path / "b.png") as image:
        np.testing.assert_array_equal(np.array(image), np.where(values == 65535, 0, values))
    values[values > 255] = 0
    Image.fromarray(values).save(tmp_path / "c.png")
    assert read_seed(tmp_path / "c.png", SIZE, CLASSES * 3).class_ids == (59,)


def test_colours_are_not_decoded(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(BadItemError, match=r"a\.png.*mode RGB"):
        read_seed(tmp_path / "a.png", SIZE, CLASSES)


def test_coco_json(tmp_path: Path) -> None:
    mask_tools = pytest.importorskip("pycocotools.mask", reason="extra: coco")
    mask = np.zeros(SIZE, np.uint8)
    mask[2:6, 3:9] = 1
    runs = mask_tools.encode(np.asfortranarray(mask))
    runs["counts"] = runs["counts"].decode()
    polygon = [[0.0, 8.0, 5.0, 8.0, 5.0, 12.0, 0.0, 12.0]]
    entries = [
        {"image_id": 9, "category_id": 90, "segmentation": runs, "score": 0.75},
        {"image_id": 9, "category_id": 1, "segmentation": polygon},
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(entries))
    classes = read_class_list("coco")
    with pytest.raises(ConfigurationError, match="category_ids"):
        open_seeds(path, classes)
    seeds = open_seeds(path, classes, options=ReadOptions(category_ids="coco91"))
    seed = seeds.read("COCO_train2014_000000000009", SIZE, None)
    assert seed.class_ids == (1, 80)
    np.testing.assert_allclose(seed.scores[1].numpy(), mask * 0.75)
    assert seed.scores[0, 9, 2] == 1
    with pytest.raises(BadItemError, match="no mask for image"):
        seeds.check("000000000010")
    with pytest.raises(BadItemError, match=r"results\.json"):
        seeds.read("000000000009", (7, 7), None)
    for broken in ("[", '{"images": []}', '[{"image_id": 1}]', "[1]"):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(ConfigurationError, match=r"broken\.json: no readable COCO JSON"):
            open_seeds(tmp_path / "broken.json", classes)
    full = {
        "images": [{"id": 9, "file_name": "x/street.jpg"}],
        "categories": [{"id": 1, "name": "Person"}, {"id": 90, "name": "toothbrush"}],
        "annotations": entries,
    }
    path.write_text(json.dumps(full))
    seeds = open_seeds(path, classes)
    assert seeds.read("street", SIZE, (80,)).class_ids == (80,)
    for other in ("frame_0009", "2008_000009", "000000000009"):
        with pytest.raises(BadItemError, match="no mask for image"):
            seeds.check(other)
    full["images"] = [{"id": 9, "file_name": "COCO_val2014_000000000139.jpg"}]
    path.write_text(json.dumps(full))
    seeds = open_seeds(path, classes)
    assert seeds.read("000000000139", SIZE, (80,)).class_ids == (80,)
    with pytest.raises(BadItemError, match="no mask for image"):
        seeds.check("000000000009")


def test_masks_of_one_class_join_and_the_higher_score_counts(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="extra: coco")

    def rectangle(left: float, right: float) -> list[list[float]]:
        return [[left, 2.0, right, 2.0, right, 6.0, left, 6.0]]

    one, other = (
        {"image_id": 9, "category_id": 1, "segmentation": rectangle(2, 8), "score": 0.75},
        {"image_id": 9, "category_id": 1, "segmentation": rectangle(5, 12), "score": 0.5},
    )
    expected = np.zeros(SIZE, np.float32)
    expected[2:6, 5:12] = 0.5
    expected[2:6, 2:8] = 0.75
    options = ReadOptions(category_ids="contiguous")
    for name, entries in (("a.json", [one, other]), ("b.json", [other, one])):
        (tmp_path / name).write_text(json.dumps(entries))
        seeds = open_seeds(tmp_path / name, read_class_list("coco"), options=options)
        seed = seeds.read("9", SIZE, None)
        assert seed.class_ids == (1,)
        np.testing.assert_array_equal(seed.scores[0].numpy(), expected)
