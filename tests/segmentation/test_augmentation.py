"""Augmentation against hand-made resizes, crops and mirror images."""

import random

import cv2
import numpy as np
import pytest

from g4seg_pl.segmentation.augmentation import Augmentation, Augmenter
from g4seg_pl.types import ConfigurationError

RNG = np.random.default_rng(0)


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture, mask and soft map that all say where each pixel came from."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=-1)
    soft = np.stack([rows, columns], axis=-1).astype(np.float32) / 255
    return image, rows, soft


@pytest.mark.parametrize("seed", range(20))
def test_crop_and_flip_are_the_same_for_all_three(seed: int) -> None:
    image, mask, soft = coordinates(50, 60)
    augmenter = Augmenter(Augmentation(crop_size=24, scale=(1, 1), flip=0.5))
    result = augmenter(image, mask, soft, seed)
    rows, columns = result["image"][..., 0], result["image"][..., 1]
    assert np.array_equal(result["mask"], rows)
    assert np.array_equal(np.rint(result["soft"] * 255), np.stack([rows, columns], axis=-1))
    # A window of the picture, forwards or mirrored.
    step = int(columns[0, 1]) - int(columns[0, 0])
    assert step in (-1, 1)
    top, left = int(rows.min()), int(columns.min())
    assert np.array_equal(image[top : top + 24, left : left + 24][:, ::step], result["image"])


@pytest.mark.parametrize("seed", range(10))
def test_scale_is_the_same_for_all_three(seed: int) -> None:
    mask = np.kron(RNG.integers(0, 5, (5, 6)), np.ones((10, 10))).astype(np.uint8)
    image = np.repeat(50 * mask[..., None], 3, axis=-1)
    soft = np.eye(5, dtype=np.float32)[mask]
    result = Augmenter(Augmentation(crop_size=40, scale=(0.5, 2.0)))(image, mask, soft, seed)
    inside = result["mask"] != 255
    assert np.array_equal(result["soft"][inside].argmax(-1), result["mask"][inside])
    # Where neighbours agree, the interpolated picture is its mask, too; at the crop's border they
    # cannot be seen.
    window = np.ones((5, 5))
    smooth = cv2.erode(result["mask"], window) == cv2.dilate(result["mask"], window)
    smooth[:2] = smooth[-2:] = smooth[:, :2] = smooth[:, -2:] = False
    middle = smooth & inside
    assert middle.sum() > 20
    assert np.array_equal(result["image"][middle][:, 0], 50 * result["mask"][middle])


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.7, 2.0])
def test_scale_is_that_of_cv2(factor: float) -> None:
    image = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    mask = RNG.integers(0, 20, (40, 30), dtype=np.uint8)
    side = max(round(40 * factor), round(30 * factor))
    augmenter = Augmenter(Augmentation(crop_size=side, scale=(factor, factor), flip=0))
    result = augmenter(image, mask, seed=0)
    size = (int(30 * factor), int(40 * factor))
    inside = result["mask"] != 255
    assert int(inside.sum()) == size[0] * size[1]
    expected = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(result["image"][inside], expected.reshape(-1, 3))
    nearest = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
    assert np.array_equal(result["mask"][inside], nearest.ravel())


def test_scales_are_uniform_and_draws_independent() -> None:
    image, mask = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), np.uint8)
    image[:, :50] = 200
    augmenter = Augmenter(Augmentation(crop_size=220, scale=(0.5, 2.0), flip=0.5))
    scales, flips = [], []
    for seed in range(300):
        result = augmenter(image, mask, seed=seed)
        inside = result["mask"] != 255
        scales.append(np.sqrt(inside.sum()) / 100)
        row = result["image"][110][inside[110]][:, 0]
        flips.append(float(row[0] < row[-1]))
    assert 0.5 <= min(scales) < 0.53
    assert 1.97 < max(scales) <= 2.0
    # Mean and deviation of a uniform variable on [0.5, 2], within four standard errors.
    assert abs(np.mean(scales) - 1.25) < 4 * 1.5 / np.sqrt(12 * 300)
    assert abs(np.std(scales) - 1.5 / np.sqrt(12)) < 0.04
    assert abs(np.mean(flips) - 0.5) < 4 * 0.5 / np.sqrt(300)
    assert abs(np.corrcoef(scales, flips)[0, 1]) < 4 / np.sqrt(300)


def test_padding_is_ignored_and_has_no_probability() -> None:
    image, mask = np.full((10, 12, 3), 9, np.uint8), np.ones((10, 12), np.uint8)
    soft = np.full((10, 12, 3), 1 / 3, np.float32)
    result = Augmenter(Augmentation(20, (1, 1), 0))(image, mask, soft, 0)
    padding = result["mask"] == 255
    assert int(padding.sum()) == 400 - 120
    assert np.all(result["soft"][padding] == 0)
    assert np.all(result["soft"][~padding] == np.float32(1 / 3))
    assert np.all(result["image"][padding] == (124, 116, 104))


def test_colour_changes_the_picture_alone() -> None:
    image, mask, soft = coordinates(32, 32)
    plain = Augmenter(Augmentation(32, (1, 1), 0))(image, mask, soft, 5)
    coloured = Augmenter(Augmentation(32, (1, 1), 0, colour=0.4))(image, mask, soft, 5)
    assert not np.array_equal(plain["image"], coloured["image"])
    assert np.array_equal(plain["mask"], coloured["mask"])
    assert np.array_equal(plain["soft"], coloured["soft"])


def test_a_seed_decides_everything_and_global_generators_nothing() -> None:
    image, mask, _ = coordinates(60, 70)
    augmenter = Augmenter(Augmentation(24, colour=0.3))
    random.seed(1)
    first = augmenter(image, mask, seed=7)
    augmenter(image, mask)
    random.seed(2)
    again, other = augmenter(image, mask, seed=7), augmenter(image, mask, seed=8)
    assert np.array_equal(first["image"], again["image"])
    assert not np.array_equal(first["image"], other["image"])


@pytest.mark.parametrize(
    "settings",
    [{"crop_size": 0}, {"scale": (2.0, 0.5)}, {"scale": (0, 1)}, {"flip": 2}, {"colour": -1}],
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="augmentation"):
        Augmentation(**settings)  # type: ignore[arg-type]
