"""Pictures of every mode, orientation and state."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from datamodules.images import check_size, header_size, read_image, read_label
from datamodules.truth import TruthOptions, read_truth
from g4seg_pl.types import BadItemError


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)


def test_rgb(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)


def test_greyscale_and_palette(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    grey = pixels[..., 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    np.testing.assert_array_equal(read_image(tmp_path / "l.png"), np.stack([grey] * 3, -1))
    few = (pixels // 128) * 255
    Image.fromarray(few).quantize(8).save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), few)
    bits = Image.fromarray(grey > 127)
    bits.save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_image(tmp_path / "1.png")[..., 1], (grey > 127) * 255)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 256 * 128, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0, :, 0], [0, 1, 128, 255])
    Image.fromarray(values.astype(np.int32) * 9).save(tmp_path / "a.tif")
    with pytest.raises(BadItemError, match="32-bit"):
        read_image(tmp_path / "a.tif")


def test_transparency_is_laid_onto_white(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    alpha = np.full((7, 11, 1), 255, np.uint8)
    alpha[0] = 0
    Image.fromarray(np.concatenate([pixels, alpha], -1)).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(read[1:], pixels[1:])
    assert (read[0] == 255).all()
    Image.fromarray(np.concatenate([pixels[..., :1], alpha], -1), "LA").save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png")[0] == 255).all()


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (11, 7), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    read = read_image(tmp_path / "a.jpg").astype(int)
    assert np.abs(read - [255, 0, 0]).max() < 10


def test_floating_point_pictures_are_refused(tmp_path: Path) -> None:
    Image.new("F", (3, 3)).save(tmp_path / "a.tif")
    with pytest.raises(BadItemError, match="mode F"):
        read_image(tmp_path / "a.tif")


def test_rotation_in_exif(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter to the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)
    turned = read_image(tmp_path / "a.png", "exif")
    np.testing.assert_array_equal(turned, np.rot90(pixels, k=-1))
    assert header_size(tmp_path / "a.png") == (7, 11)
    assert header_size(tmp_path / "a.png", "exif") == (11, 7)
    with pytest.raises(BadItemError, match=r"quarter turn.*orientation"):
        check_size(tmp_path / "seed.npy", "seed", (7, 11), (11, 7), "")


@pytest.mark.parametrize("noted", range(1, 9))
def test_the_header_says_how_large_the_turned_picture_is(
    noted: int, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = noted
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    # By the standard 5 to 8 lie on their side.
    assert header_size(tmp_path / "a.png", "exif") == ((11, 7) if noted >= 5 else (7, 11))
    assert read_image(tmp_path / "a.png", "exif").shape[:2] == header_size(
        tmp_path / "a.png", "exif"
    )


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_pictures(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    for kept in (0, 3, 30, len(content) // 2):
        path.write_bytes(content[:kept])
        with pytest.raises(BadItemError, match=rf"cut\.{suffix}"):
            read_image(path)


def test_missing_picture_and_folder(tmp_path: Path) -> None:
    with pytest.raises(BadItemError, match=r"none\.jpg: no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(BadItemError, match="truncated or not a picture"):
        read_image(tmp_path)


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    for limit in (1000, 100):  # Pillow warns above its limit and raises above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadItemError, match=r"a\.png: too large"):
            read_image(tmp_path / "a.png")


def label(path: Path, values: list[int]) -> Path:
    Image.fromarray(np.array([values], dtype=np.uint8)).save(path)
    return path


def test_truth_of_every_numbering(tmp_path: Path) -> None:
    def read(values: list[int], classes: int, options: TruthOptions) -> list[int]:
        read = read_truth(label(tmp_path / "t.png", values), classes, options)
        assert read.dtype == np.uint8
        return [int(value) for value in read[0]]

    assert read([0, 1, 20, 255], 20, TruthOptions()) == [0, 1, 20, 255]
    assert read([0, 1, 150, 255], 150, TruthOptions(zero_is_ignored=True)) == [255, 1, 150, 255]
    assert read([0, 18, 255], 19, TruthOptions(label_offset=-1)) == [1, 19, 255]
    coco = TruthOptions(category_ids="coco91")
    assert read([0, 1, 13, 90, 255], 80, coco) == [0, 1, 12, 80, 255]
    for values, classes, options in (
        ([21], 20, TruthOptions()),
        ([12], 80, coco),
        ([19], 19, TruthOptions(label_offset=-1)),
    ):
        with pytest.raises(BadItemError, match=rf"t\.png.*\[{values[0]}\]"):
            read(values, classes, options)


def test_sixteen_bit_labels(tmp_path: Path) -> None:
    values = np.array([[0, 459]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label(tmp_path / "a.png"), values)
    with pytest.raises(BadItemError, match="459"):
        read_truth(tmp_path / "a.png", 59, TruthOptions())
