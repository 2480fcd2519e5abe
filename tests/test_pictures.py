"""Pictures and masks of every kind, and those that are refused."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from g4seg_pl.pictures import mask_to_tensor, picture_to_tensor, tensor_like
from g4seg_pl.types import BadItemError

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(2, 0, 1)
SIZE = (4, 6)


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(PIXELS),
        Image.fromarray(np.dstack([PIXELS, np.full(SIZE, 9, np.uint8)])),
        PIXELS,
        PIXELS[::-1][::-1],
        PIXELS / 255,
        EXPECTED,
        EXPECTED.float() / 255,
    ],
)
def test_colour_pictures_of_any_kind_are_the_same(picture: object) -> None:
    assert torch.equal(picture_to_tensor(picture), EXPECTED)


@pytest.mark.parametrize("order", ["<", ">"])
def test_either_byte_order_is_read(order: str) -> None:
    assert torch.equal(picture_to_tensor((PIXELS / 255).astype(f"{order}f4")), EXPECTED)
    given = (PIXELS[..., 0] / 255).astype(f"{order}f4")
    mask = mask_to_tensor(given, "dog", SIZE)
    torch.testing.assert_close(mask, EXPECTED[0] / 255)
    assert np.array_equal(tensor_like(mask, given), given)
    whole = np.eye(*SIZE, dtype=f"{order}i4")
    assert torch.equal(mask_to_tensor(whole, "dog", SIZE), torch.eye(*SIZE))


def test_pillows_own_arrays_are_read_without_a_warning() -> None:
    # PyTorch warns once a process, about the first array that cannot be written to.
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        assert torch.equal(picture_to_tensor(np.asarray(Image.fromarray(PIXELS))), EXPECTED)
        mask = np.asarray(Image.fromarray(PIXELS[..., 0]))
        assert torch.equal(mask_to_tensor(mask, "dog", SIZE), EXPECTED[0] / 255)
        torch.set_warn_always(False)
    assert not told


@pytest.mark.parametrize("values", [np.full(SIZE, "a"), np.full(SIZE, 1j), np.full(SIZE, None)])
def test_arrays_of_no_numbers_are_refused(values: np.ndarray) -> None:
    with pytest.raises(BadItemError, match=r"mask of 'dog' has values of type"):
        mask_to_tensor(values, "dog", SIZE)
    with pytest.raises(BadItemError, match="image has values of type"):
        picture_to_tensor(values)


@pytest.mark.parametrize("picture", [Image.fromarray(PIXELS[..., 0]), PIXELS[..., 0]])
def test_grey_pictures_become_three_channels(picture: object) -> None:
    assert torch.equal(picture_to_tensor(picture), EXPECTED[:1].expand(3, -1, -1))


def test_other_modes_of_pillow_are_converted() -> None:
    cmyk = Image.fromarray(PIXELS).convert("CMYK")
    assert picture_to_tensor(cmyk).shape == (3, 4, 6)
    palette = Image.fromarray(PIXELS).convert("P")
    assert picture_to_tensor(palette).shape == (3, 4, 6)


def test_pictures_stay_as_they_are_stored(tmp_path: Path) -> None:
    stored = Image.fromarray(PIXELS)
    exif = stored.getexif()
    exif[0x0112] = 3
    stored.save(tmp_path / "turned.png", exif=exif)
    opened = Image.open(tmp_path / "turned.png")
    assert opened.getexif()[0x0112] == 3
    # What a maker of masks sees, and what `refine` is given as an array.
    assert torch.equal(picture_to_tensor(opened), picture_to_tensor(np.array(opened)))
    assert torch.equal(picture_to_tensor(opened), EXPECTED)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("I;16", (6, 4)), "mode I;16"),
        (PIXELS.transpose(2, 0, 1), r"shape \(3, 4, 6\); give \(H, W, 3\)"),
        (torch.from_numpy(PIXELS), r"shape \(4, 6, 3\); give \(3, H, W\)"),
        (PIXELS.astype(np.int64), "numbers of type torch.int64"),
        (PIXELS.astype(np.float32), r"outside \[0, 1\]"),
        (np.full((4, 6, 3), np.nan), r"outside \[0, 1\]"),
        (np.zeros((0, 6, 3), np.uint8), r"shape \(0, 6, 3\)"),
        ("dog.jpg", r"image is the path dog\.jpg; open it first"),
        (PIXELS.tolist(), "image is a list; give a PIL image"),
    ],
)
def test_other_pictures_are_refused(picture: object, message: str) -> None:
    with pytest.raises(BadItemError, match=message):
        picture_to_tensor(picture)


HALVES = np.zeros(SIZE, bool)
HALVES[:, 3:] = True


@pytest.mark.parametrize(
    "mask",
    [
        HALVES,
        HALVES.astype(np.uint8),
        HALVES.astype(np.int64),
        HALVES.astype(np.uint8) * 255,
        HALVES.astype(np.float64),
        torch.from_numpy(HALVES),
        Image.fromarray(HALVES),
        Image.fromarray(HALVES.astype(np.uint8) * 255),
        Image.fromarray(HALVES.astype(np.float32)),
    ],
)
def test_masks_of_any_kind_are_the_same(mask: object) -> None:
    found = mask_to_tensor(mask, "dog", SIZE)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(HALVES).float())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((6, 4)), r"mask of 'dog' has shape \(6, 4\); the image has \(4, 6\)"),
        (np.full(SIZE, 1.5), r"outside \[0, 1\]"),
        (np.full(SIZE, np.nan), "not a number"),
        (np.full(SIZE, 7, np.int64), "numbers of type torch.int64"),
        (Image.new("RGB", (6, 4)), "mode RGB"),
        (Path("dog.png"), r"mask of 'dog' is the path dog\.png; open it first"),
        (0.5, "mask of 'dog' is a float; give a PIL image"),
    ],
)
def test_other_masks_are_refused(mask: object, message: str) -> None:
    with pytest.raises(BadItemError, match=message):
        mask_to_tensor(mask, "dog", SIZE)


@pytest.mark.parametrize(
    ("given", "dtype"), [(np.float64, np.float64), (np.float16, np.float16), (bool, np.float32)]
)
def test_results_have_the_kind_of_what_was_given(given: type, dtype: type) -> None:
    result = torch.full(SIZE, 0.25)
    array = tensor_like(result, np.zeros(SIZE, given))
    assert array.dtype == dtype
    assert (array == 0.25).all()
    tensor = tensor_like(result, torch.from_numpy(np.zeros(SIZE, given)))
    assert tensor.numpy().dtype == dtype
    picture = tensor_like(result, Image.new("L", (6, 4)))
    assert (picture.mode, picture.size) == ("F", (6, 4))


@pytest.mark.parametrize("values", [(0, 9), (0, 1, 255), (3, 15, 255)])
def test_label_values_are_not_taken_for_shades(values: tuple[int, ...]) -> None:
    labels = np.resize(np.array(values, np.uint8), SIZE)
    with pytest.raises(BadItemError, match=r"mask of 'dog' holds the values .*mask == "):
        mask_to_tensor(labels, "dog", SIZE)


@pytest.mark.parametrize("values", [(0, 255), (0, 128, 255), (0,), tuple(range(24))])
def test_shades_are(values: tuple[int, ...]) -> None:
    shades = np.resize(np.array(values, np.uint8), SIZE)
    found = mask_to_tensor(shades, "dog", SIZE)
    np.testing.assert_allclose(found, shades / 255, atol=1e-6)
