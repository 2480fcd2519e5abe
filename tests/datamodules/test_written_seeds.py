"""Seeds written as other projects read them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat
from seed_dialects import CLASSES, IDS, SIZE, Maps

from datamodules.seed_files import (
    WritableDialect,
    detect,
    read_seed,
    write_seed,
)
from datamodules.seed_files.maps import ReadOptions
from datamodules.training_items import read_soft
from g4seg_pl.main import main
from g4seg_pl.types import BadItemError

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


@pytest.mark.parametrize("dialect", get_args(WritableDialect))
def test_nothing_found_can_be_written(dialect: WritableDialect, tmp_path: Path) -> None:
    suffix = f".{dialect}" if dialect in ("mat", "npz", "png") else ".npy"
    path, none = tmp_path / f"a{suffix}", np.zeros((0, *SIZE), np.float32)
    write_seed(path, (), none, dialect, classes=CLASSES, background=0.5)
    if dialect in ("clip_es", "irn", "npz", "png", "npy"):
        seed = read_seed(path, SIZE, CLASSES, options=ReadOptions(empty="keep"))
        assert seed.class_ids == ()
        assert seed.scores.shape == (0, *SIZE)


def test_training_takes_soft_maps_of_classes_that_were_put_out(tmp_path: Path) -> None:
    maps = np.zeros((2, *SIZE), np.float32)
    maps[0, 2, 3] = 0.5
    write_seed(tmp_path / "a.npy", (1, 4), maps, "clip_es")
    assert read_soft(tmp_path / "a.npy", SIZE, CLASSES).class_ids == (1, 4)


def test_nothing_found_needs_no_resizing(tmp_path: Path) -> None:
    path, reduced = tmp_path / "a.npz", np.zeros((0, 3, 4), np.float16)
    np.savez(path, class_ids=[], foreground=reduced, image_size=SIZE)
    keep = ReadOptions(empty="keep")
    assert read_seed(path, SIZE, CLASSES, options=keep).scores.shape == (0, *SIZE)
    with pytest.raises(BadItemError, match="image_size"):
        read_seed(path, (SIZE[0] + 1, SIZE[1]), CLASSES, options=keep)
    (tmp_path / "from").mkdir()
    write_seed(tmp_path / "from" / "a.npy", (), np.zeros((0, *SIZE), np.float32), "clip_es")
    words = [
        "convert",
        "--from",
        "clip_es",
        "--to",
        "npz",
        "--stride",
        "4",
        "--options.empty",
        "keep",
    ]
    assert main([*words, "--class_names", "voc", str(tmp_path / "from"), str(tmp_path / "to")]) == 0
    assert read_seed(tmp_path / "to" / "a.npz", SIZE, 20, options=keep).class_ids == ()


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
    with pytest.raises(BadItemError, match=r"a\.npz.*image_size"):
        read_seed(tmp_path / "a.npz", (SIZE[0], SIZE[1] + 1), CLASSES)


@pytest.mark.parametrize("size", [(3,), (0, 4), (2.5, 4), "13x18"])
def test_an_image_size_that_is_none_is_named(size: object, maps: Maps, tmp_path: Path) -> None:
    fields = {"class_ids": np.array(IDS), "foreground": maps, "image_size": np.array(size)}
    np.savez(tmp_path / "a.npz", **fields)
    with pytest.raises(BadItemError, match=r"a\.npz.*image_size"):
        read_seed(tmp_path / "a.npz", SIZE, CLASSES)


def test_a_name_may_be_as_long_as_the_file_system_has_them(maps: Maps, tmp_path: Path) -> None:
    path = tmp_path / f"{'a' * 251}.npz"
    write_seed(path, IDS, maps, "npz")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classes"):
        write_seed(tmp_path / "a.npy", IDS, np.ones((2, 3, 3), np.float32), "npy")
    assert not list(tmp_path.iterdir())


def test_present_classes_in_half_precision_are_small(tmp_path: Path) -> None:
    """A 500 x 375 image with two classes: 0.75 MB instead of 15 MB for all classes in float32."""
    maps = np.random.default_rng(0).random((2, 375, 500)).astype(np.float32)
    assert write_seed(tmp_path / "a.npy", IDS, maps, "clip_es") < 2 * 375 * 500 * 2 + 1000
