"""Every dialect: read as its project writes it, written as its project reads it, refused if bad."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat, savemat

from datamodules.classes import read_class_list
from datamodules.seed_files import (
    ReadOptions,
    WritableDialect,
    detect,
    open_seeds,
    read_maps,
    read_seed,
    write_seed,
)
from datamodules.seed_files.label_png import palette
from g4seg_pl.types import BadItemError, ConfigurationError

SIZE = (13, 18)
IDS = (3, 15)
CLASSES = 20
Maps = NDArray[np.float32]


@pytest.fixture
def maps() -> Maps:
    """Two maps in [0, 1], each reaching both ends as min-max normalised ones do."""
    scores = np.random.default_rng(0).random((2, *SIZE)).astype(np.float32)
    low, high = scores.min(axis=(1, 2), keepdims=True), scores.max(axis=(1, 2), keepdims=True)
    return np.asarray((scores - low) / (high - low))


def save(path: Path, content: object) -> Path:
    np.save(path, content, allow_pickle=True)  # type: ignore[arg-type]
    return path


# As the projects write them -----------------------------------------------------------------------


def clip_es(path: Path, maps: Maps) -> Path:
    keys = np.array([2, 14])
    return save(path / "a.npy", {"keys": keys, "attn_highres": maps.astype(np.float16)})


def irn(path: Path, maps: Maps) -> Path:
    cam = torch.from_numpy(maps)[:, ::4, ::4]
    return save(path / "a.npy", {"keys": torch.tensor([2, 14]), "cam": cam, "high_res": maps})


def toco(path: Path, maps: Maps) -> Path:
    return save(path / "a.npy", {"keys": np.array([2, 14]), "high_res": maps})


def seam(path: Path, maps: Maps) -> Path:
    return save(path / "a.npy", {2: maps[0], 14: maps[1]})


def seam_crf(path: Path, maps: Maps) -> Path:
    full = np.concatenate([np.ones((1, *SIZE), np.float32), maps])
    full = full / full.sum(axis=0)
    return save(path / "a.npy", {0: full[0], 3: full[1], 15: full[2]})


def weaktr(path: Path, maps: Maps) -> Path:
    full = np.concatenate([np.ones((1, *SIZE), np.float32), maps])
    return save(path / "a.npy", {"prob": full / full.sum(axis=0), "keys": np.array([0, 3, 15])})


def diffsegmenter(path: Path, maps: Maps) -> Path:
    savemat(path / "a.mat", {"2": maps[0] * 255, "14": maps[1] * 255})
    return path / "a.mat"


def named_npz(path: Path, maps: Maps) -> Path:
    np.savez(path / "a.npz", class_ids=np.array(IDS), foreground=maps)
    return path / "a.npz"


def all_classes(path: Path, maps: Maps) -> Path:
    full = np.zeros((CLASSES, *SIZE), np.float32)
    full[[2, 14]] = maps
    return save(path / "a.npy", full)


def with_background(path: Path, maps: Maps) -> Path:
    full = np.zeros((CLASSES + 1, *SIZE), np.float32)
    full[[3, 15]] = maps
    return save(path / "a.npy", full)


DIALECTS: list[tuple[Callable[[Path, Maps], Path], str, float]] = [
    (clip_es, "clip_es", 1e-3),
    (irn, "irn", 0),
    (toco, "irn", 0),
    (seam, "seam", 0),
    (diffsegmenter, "mat", 1e-6),
    (named_npz, "npz", 0),
    (all_classes, "npy", 0),
    (with_background, "npy", 0),
]


@pytest.mark.parametrize(("make", "dialect", "tolerance"), DIALECTS)
def test_reads_what_the_projects_write(
    make: Callable[[Path, Maps], Path], dialect: str, tolerance: float, maps: Maps, tmp_path: Path
) -> None:
    path = make(tmp_path, maps)
    assert detect(path) == dialect
    seed = read_seed(path, SIZE, CLASSES)
    assert seed.class_ids == IDS
    assert seed.scores.dtype == torch.float32
    np.testing.assert_allclose(seed.scores.numpy(), maps, atol=tolerance)


@pytest.mark.parametrize(("make", "dialect"), [(seam_crf, "seam_crf"), (weaktr, "weaktr")])
def test_the_background_in_the_file_is_left_out(
    make: Callable[[Path, Maps], Path], dialect: str, maps: Maps, tmp_path: Path
) -> None:
    path = make(tmp_path, maps)
    assert detect(path) == dialect
    seed = read_seed(path, SIZE, CLASSES)
    assert seed.class_ids == IDS
    np.testing.assert_allclose(seed.scores.numpy(), maps / (1 + maps.sum(axis=0)), atol=1e-6)


def test_class_zero_of_seam_is_the_first_class_when_maps_reach_one(
    maps: Maps, tmp_path: Path
) -> None:
    assert read_seed(save(tmp_path / "a.npy", {0: maps[0]}), SIZE, CLASSES).class_ids == (1,)


def test_class_zero_that_may_be_the_background_is_ambiguous(maps: Maps, tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", {0: maps[0] * 0.5, 3: maps[1]})
    with pytest.raises(BadItemError, match=r"a\.npy.*dialect=seam_crf or dialect=seam"):
        detect(path)
    assert read_seed(path, SIZE, CLASSES, "seam").class_ids == (1, 4)
    assert read_seed(path, SIZE, CLASSES, "seam_crf").class_ids == (3,)


def test_two_dialects_in_one_file_are_ambiguous(maps: Maps, tmp_path: Path) -> None:
    content = {"keys": np.array([2, 14]), "attn_highres": maps, "high_res": maps * 0.5}
    path = save(tmp_path / "a.npy", content)
    with pytest.raises(BadItemError, match="clip_es and irn"):
        read_seed(path, SIZE, CLASSES)
    forced = read_seed(path, SIZE, CLASSES, "irn")
    np.testing.assert_allclose(forced.scores.numpy(), maps * 0.5)


def test_forcing_another_dialect_fails(maps: Maps, tmp_path: Path) -> None:
    for dialect in ("irn", "png", "coco", "seam"):
        with pytest.raises(BadItemError, match=f"(?s)a.npy.*{dialect}"):
            read_seed(clip_es(tmp_path, maps), SIZE, CLASSES, dialect)  # type: ignore[arg-type]


def test_small_cam_is_used_only_without_a_full_map(maps: Maps, tmp_path: Path) -> None:
    small = torch.from_numpy(maps)[:, ::4, ::4]
    path = save(tmp_path / "a.npy", {"keys": torch.tensor([2, 14]), "cam": small})
    seed = read_seed(path, SIZE, CLASSES)
    # Bilinear with half-pixel centres, as a plain loop.
    height, width = small.shape[1:]
    for row, column in [(0, 0), (5, 7), (12, 17)]:
        y = min(max((row + 0.5) * height / SIZE[0] - 0.5, 0), height - 1)
        x = min(max((column + 0.5) * width / SIZE[1] - 0.5, 0), width - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        expected = (
            small[0, top, left] * (top + 1 - y) * (left + 1 - x)
            + small[0, top, right] * (top + 1 - y) * (x - left)
            + small[0, bottom, left] * (y - top) * (left + 1 - x)
            + small[0, bottom, right] * (y - top) * (x - left)
        )
        assert seed.scores[0, row, column].item() == pytest.approx(expected.item(), abs=1e-5)


# Label images -------------------------------------------------------------------------------------


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


# Plain arrays -------------------------------------------------------------------------------------


def test_present_classes_need_labels(maps: Maps, tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", maps)
    with pytest.raises(BadItemError, match="fits no reading"):
        read_seed(path, SIZE, CLASSES)
    assert read_seed(path, SIZE, CLASSES, labels=(15, 3)).class_ids == IDS
    assert read_seed(path, SIZE, CLASSES, labels=(3,)).class_ids == (3,)
    np.savez(tmp_path / "b.npz", maps)
    assert detect(tmp_path / "b.npz") == "npz"
    assert read_seed(tmp_path / "b.npz", SIZE, CLASSES, labels=IDS).class_ids == IDS


def test_ambiguous_channels_are_an_error_until_said(maps: Maps, tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", maps)
    with pytest.raises(BadItemError, match="fits several readings"):
        read_seed(path, SIZE, 2, labels=(2,))
    said = read_seed(path, SIZE, 2, labels=(2,), options=ReadOptions(channels="all"))
    np.testing.assert_array_equal(said.scores[0].numpy(), maps[1])
    background = ReadOptions(channels="background+present")
    assert read_seed(path, SIZE, 2, labels=(1,), options=background).class_ids == (1,)


@given(
    logits=hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-50, 50, width=32)),
)
def test_logits(logits: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save(tmp_path_factory.mktemp("logits") / "a.npy", logits)
    tensor = torch.from_numpy(logits)
    for activation, expected in (("softmax", tensor.softmax(0)), ("sigmoid", tensor.sigmoid())):
        options = ReadOptions(activation=activation, present_at=0)  # type: ignore[arg-type]
        maps = read_maps(path, 3, options=options)
        np.testing.assert_allclose(maps.maps, expected.numpy(), atol=1e-6)


def test_logits_are_not_guessed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", np.full((CLASSES, *SIZE), 4.0))
    with pytest.raises(BadItemError, match="activation"):
        read_seed(path, SIZE, CLASSES)
    bytes_ = save(tmp_path / "b.npy", np.full((CLASSES, *SIZE), 255, np.uint8))
    seed = read_seed(bytes_, SIZE, CLASSES, options=ReadOptions(activation="byte"))
    assert (seed.scores == 1).all()


# COCO JSON ----------------------------------------------------------------------------------------


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
    assert open_seeds(path, classes).read("street", SIZE, (80,)).class_ids == (80,)


# Bad seeds ----------------------------------------------------------------------------------------


def bad_seeds(maps: Maps) -> dict[str, tuple[object, str]]:
    keys, nan = np.array([2, 14]), maps.copy()
    nan[0, 3, 3] = np.nan
    return {
        "NaN": ({"keys": keys, "attn_highres": nan}, "attn_highres has 1 values that are NaN"),
        "infinite": ({"keys": keys, "attn_highres": maps + np.inf}, "NaN or infinite"),
        "too large": ({"keys": keys, "attn_highres": maps * 2}, "not 0 to 1"),
        "negative": ({"keys": keys, "attn_highres": -maps}, "not 0 to 1"),
        "another size": ({"keys": keys, "attn_highres": maps[:, :5]}, "the seed is 5x18"),
        "turned": ({"keys": keys, "attn_highres": maps.transpose(0, 2, 1)}, "orientation"),
        "no class": ({"keys": keys[:0], "attn_highres": maps[:0]}, "no class"),
        "unknown class": ({"keys": keys + 10, "attn_highres": maps}, r"\[25\]"),
        "negative class": ({"keys": keys - 3, "attn_highres": maps}, r"\[0\]"),
        "class twice": ({"keys": keys * 0, "attn_highres": maps}, "twice"),
        "fractional class": ({"keys": keys + 0.5, "attn_highres": maps}, "fractional"),
        "counts differ": ({"keys": keys[:1], "attn_highres": maps}, "1 class ids for 2 maps"),
        "empty map": ({"keys": keys, "attn_highres": maps * [[[0]], [[1]]]}, r"\[3\] are empty"),
        "two dimensions": ({"keys": keys, "attn_highres": maps[0]}, r"shape \(13, 18\)"),
        "text": ({"keys": keys, "attn_highres": "none"}, "not an array of numbers"),
        "ragged": ({2: maps[0], 14: maps[1][:3]}, "several shapes"),
        "unknown fields": ({"mask": maps}, "no known dialect"),
        "empty dictionary": ({}, "no fields"),
        "a list": ([1, "a"], "not an array of numbers"),
    }


@pytest.mark.parametrize("name", bad_seeds(np.zeros((2, *SIZE), np.float32)))
def test_bad_seeds_name_file_and_field(name: str, maps: Maps, tmp_path: Path) -> None:
    content, message = bad_seeds(maps)[name]
    path = tmp_path / "2007_000032.npy"
    array = np.empty((), dtype=object)
    array[()] = content
    np.save(path, array, allow_pickle=True)
    with pytest.raises(BadItemError, match=rf"2007_000032\.npy.*{message}"):
        read_seed(path, SIZE, CLASSES)


def test_bad_mat_and_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file" * 20)
    with pytest.raises(BadItemError, match=r"a\.mat"):
        read_seed(path, SIZE, CLASSES)
    savemat(path, {"cam": np.ones(SIZE)})
    with pytest.raises(BadItemError, match="'cam'"):
        read_seed(path, SIZE, CLASSES)
    with pytest.raises(BadItemError, match=r"'\.txt'"):
        read_seed(tmp_path / "a.txt", SIZE, CLASSES)


def test_labels_select_classes(maps: Maps, tmp_path: Path) -> None:
    path = clip_es(tmp_path, maps)
    assert read_seed(path, SIZE, CLASSES, labels=(15,)).class_ids == (15,)
    with pytest.raises(BadItemError, match="labelled"):
        read_seed(path, SIZE, CLASSES, labels=(1,))


def test_folders(maps: Maps, tmp_path: Path) -> None:
    classes = read_class_list("voc")
    with pytest.raises(ConfigurationError, match="seeds: no folder"):
        open_seeds(tmp_path / "none", classes)
    seeds = open_seeds(tmp_path, classes)
    with pytest.raises(BadItemError, match="no seed file"):
        seeds.check("a")
    clip_es(tmp_path, maps)
    seeds.check("a")
    named_npz(tmp_path, maps)
    with pytest.raises(BadItemError, match=r"several seeds: a\.npy, a\.npz"):
        seeds.read("a", SIZE, None)


# Written as others read ---------------------------------------------------------------------------

WRITTEN: list[tuple[WritableDialect, float]] = [
    ("clip_es", 1e-3),
    ("irn", 1e-3),
    ("seam", 1e-3),
    ("mat", 1 / 255),
    ("npz", 1e-3),
    ("npy", 1e-3),
]


@pytest.mark.parametrize(("dialect", "tolerance"), WRITTEN)
def test_written_seeds_are_read_back(
    dialect: WritableDialect, tolerance: float, maps: Maps, tmp_path: Path
) -> None:
    suffix = f".{dialect}" if dialect in ("mat", "npz") else ".npy"
    path = tmp_path / f"a{suffix}"
    size = write_seed(path, IDS, maps, dialect, classes=CLASSES)
    assert size == path.stat().st_size
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    seed = read_seed(path, SIZE, CLASSES)
    assert seed.class_ids == IDS
    np.testing.assert_allclose(seed.scores.numpy(), maps, atol=tolerance)


def reference_label(
    keys: Sequence[int], scores: NDArray[np.floating[Any]], threshold: float
) -> NDArray[np.int64]:
    """Argmax over a constant background and the classes, as every evaluation script does it."""
    label = np.zeros(SIZE, np.int64)
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            best = threshold
            for key, score in zip(keys, scores, strict=True):
                if score[row, column] > best:
                    best, label[row, column] = score[row, column], int(key) + 1
    return label


def test_clip_es_evaluates_what_is_written(maps: Maps, tmp_path: Path) -> None:
    """CLIP-ES: `np.load(...).item()`, then `keys` and `attn_highres` padded by NumPy."""
    write_seed(tmp_path / "a.npy", IDS, maps, "clip_es")
    content = np.load(tmp_path / "a.npy", allow_pickle=True).item()
    scores = np.pad(content["attn_highres"], ((1, 0), (0, 0), (0, 0)), constant_values=0.4)
    keys = np.pad(content["keys"] + 1, (1, 0), mode="constant")
    expected = reference_label([2, 14], maps.astype(np.float16), 0.4)
    np.testing.assert_array_equal(keys[np.argmax(scores, axis=0)], expected)
    assert content["attn_highres"].dtype == np.float16


def test_irn_evaluates_what_is_written(maps: Maps, tmp_path: Path) -> None:
    """IRN: `high_res` and `keys` padded by NumPy; `cam` a float32 tensor at stride 4."""
    write_seed(tmp_path / "a.npy", IDS, maps, "irn")
    content = np.load(tmp_path / "a.npy", allow_pickle=True).item()
    scores = np.pad(content["high_res"], ((1, 0), (0, 0), (0, 0)), constant_values=0.15)
    keys = np.pad(content["keys"] + 1, (1, 0), mode="constant")
    expected = reference_label([2, 14], maps.astype(np.float16), 0.15)
    np.testing.assert_array_equal(keys[np.argmax(scores, axis=0)], expected)
    assert isinstance(content["cam"], torch.Tensor)
    assert content["cam"].shape == (2, (SIZE[0] - 1) // 4 + 1, (SIZE[1] - 1) // 4 + 1)


def test_seam_evaluates_what_is_written(maps: Maps, tmp_path: Path) -> None:
    """SEAM, MCTformer: `tensor[key + 1] = dictionary[key]`, background a constant."""
    write_seed(tmp_path / "a.npy", IDS, maps, "seam")
    content = np.load(tmp_path / "a.npy", allow_pickle=True).item()
    tensor = np.zeros((21, *SIZE), np.float32)
    for key in content:
        tensor[key + 1] = content[key]
    tensor[0] = 0.26
    expected = reference_label([2, 14], maps.astype(np.float16), 0.26)
    np.testing.assert_array_equal(np.argmax(tensor, axis=0), expected)


def test_crf_dictionaries_sum_to_one(maps: Maps, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_seed(path, IDS, maps, "seam_crf")
    content = np.load(path, allow_pickle=True).item()
    assert list(content) == [0, *IDS]
    np.testing.assert_allclose(np.sum([content[key] for key in content], axis=0), 1, atol=2e-3)
    assert detect(path) == "seam_crf"


def test_diffsegmenter_reads_what_is_written(maps: Maps, tmp_path: Path) -> None:
    write_seed(tmp_path / "a.mat", IDS, maps, "mat")
    content = loadmat(tmp_path / "a.mat")
    np.testing.assert_allclose(content["14"], maps[1] * 255, atol=0.51)


def test_label_images_are_written_with_a_palette(maps: Maps, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_seed(path, IDS, maps, "png", background=0.6)
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]  # type: ignore[index]
        np.testing.assert_array_equal(np.array(image), reference_label([2, 14], maps, 0.6))
    with pytest.raises(ValueError, match="background"):
        write_seed(path, IDS, maps, "png")


def test_reduced_npz_is_resized_to_the_image(maps: Maps, tmp_path: Path) -> None:
    write_seed(tmp_path / "a.npz", IDS, maps[:, ::2, ::2], "npz", image_size=SIZE)
    assert read_seed(tmp_path / "a.npz", SIZE, CLASSES).scores.shape == (2, *SIZE)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classes"):
        write_seed(tmp_path / "a.npy", IDS, np.ones((2, 3, 3), np.float32), "npy")
    assert not list(tmp_path.iterdir())


def test_present_classes_in_half_precision_are_small(tmp_path: Path) -> None:
    """A 500 x 375 image with two classes: 0.75 MB instead of 15 MB for all classes in float32."""
    maps = np.random.default_rng(0).random((2, 375, 500)).astype(np.float32)
    assert write_seed(tmp_path / "a.npy", IDS, maps, "clip_es") < 2 * 375 * 500 * 2 + 1000
