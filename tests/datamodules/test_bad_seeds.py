"""Seed files that are refused: file, field and remedy are named."""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from seed_dialects import CLASSES, SIZE, Maps, clip_es, named_npz

from datamodules.classes import read_class_list
from datamodules.seed_files import (
    open_seeds,
    read_seed,
)
from datamodules.seed_files.maps import ReadOptions
from g4seg_pl.evaluation.soft import threshold_counts
from g4seg_pl.types import BadItemError, ConfigurationError


def bad_seeds(maps: Maps) -> dict[str, tuple[object, str]]:
    keys, nan = np.array([2, 14]), maps.copy()
    nan[0, 3, 3] = np.nan
    return {
        "NaN": ({"keys": keys, "attn_highres": nan}, "attn_highres has 1 values that are NaN"),
        "infinite": ({"keys": keys, "attn_highres": maps + np.inf}, "NaN or infinite"),
        "too large": ({"keys": keys, "attn_highres": maps * 2}, "not 0 to 1.*as clip_es"),
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


@pytest.mark.parametrize("name", ["no class", "empty map"])
def test_what_is_empty_is_kept_on_request(name: str, maps: Maps, tmp_path: Path) -> None:
    content = bad_seeds(maps)[name][0]
    path = tmp_path / "a.npy"
    np.save(path, np.array(content, dtype=object), allow_pickle=True)
    with pytest.raises(BadItemError, match=r"seed_options\.empty"):
        read_seed(path, SIZE, CLASSES)
    seed = read_seed(path, SIZE, CLASSES, options=ReadOptions(empty="keep"))
    assert len(seed.class_ids) == len(seed.scores) == len(content["keys"])
    counts = threshold_counts(seed.scores.numpy(), seed.class_ids, np.zeros(SIZE), 21, [0.2, 0.99])
    assert counts.sum() == 2 * SIZE[0] * SIZE[1]
    assert counts[:, 0, 3].sum() == 0


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
