"""Fake trees of the data-set layouts, small enough to be made for every test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from seed_dialects import SIZE, Maps
from stored_trees import SIZES

from datamodules.seed_files.label_png import palette

HEIGHT, WIDTH = 12, 17


@pytest.fixture
def save_image() -> Callable[..., Path]:
    """Writes a noise picture and makes its folder."""

    def save(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(len(path.name)).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        return path

    return save


@pytest.fixture
def save_label() -> Callable[..., Path]:
    """Writes a label image with the given values in equal columns, and makes its folder."""

    def save(path: Path, values: list[int], mode: str = "L") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        columns: NDArray[np.uint8] = np.array(values, dtype=np.uint8)
        label = columns[np.arange(WIDTH) * len(values) // WIDTH][None].repeat(HEIGHT, axis=0)
        image = Image.fromarray(label)
        if mode == "P":
            image.putpalette(palette())
        image.save(path)
        return path

    return save


@pytest.fixture
def save_seed() -> Callable[..., Path]:
    """Writes a CLIP-ES seed of label values, and makes its folder."""

    def save(path: Path, class_ids: list[int], size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = np.linspace(0, 1, len(class_ids) * size[0] * size[1], dtype=np.float16)
        maps = scores.reshape(len(class_ids), *size)
        content = {"keys": np.array(class_ids) - 1, "attn_highres": maps}
        np.save(path, content, allow_pickle=True)  # type: ignore[arg-type]
        return path

    return save


XML = "<annotation>{}</annotation>"
OBJECT = "<object><name>{}</name><part><name>head</name></part></object>"


@pytest.fixture
def voc(
    tmp_path: Path,
    save_image: Callable[..., Path],
    save_label: Callable[..., Path],
    save_seed: Callable[..., Path],
) -> Path:
    """VOCdevkit with five images: a, b train; c val; d, e only in the augmented truth."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    (root / "Annotations").mkdir()
    for name in "abcde":
        save_image(root / "JPEGImages" / f"{name}.jpg")
        save_label(root / "SegmentationClassAug" / f"{name}.png", [0, 3, 15, 255])
        objects = "".join(OBJECT.format(word) for word in ("bird", "person", "bird"))
        (root / "Annotations" / f"{name}.xml").write_text(XML.format(objects))
        save_seed(tmp_path / "cam_out" / f"{name}.npy", [3, 15])
    for name in "abc":
        save_label(root / "SegmentationClass" / f"{name}.png", [0, 3, 255], "P")
    return root


@pytest.fixture
def bucket() -> Iterator[str]:
    """An empty folder in memory."""
    system = fsspec.filesystem("memory")
    system.makedirs("/bucket", exist_ok=True)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


@pytest.fixture
def tree(
    tmp_path: Path,
    save_image: Callable[..., Path],
    save_seed: Callable[..., Path],
) -> Path:
    """Images of several kinds, seeds and truth in local folders."""
    (tmp_path / "truth").mkdir()
    for index, (name, size) in enumerate(SIZES.items()):
        save_image(tmp_path / "images" / f"{name}{('.jpg', '.PNG')[index % 2]}", size)
        save_seed(tmp_path / "seeds" / f"{name}.npy", [3, 15][: 1 + index % 2], size)
        Image.new("L", size[::-1], 3 * index).save(tmp_path / "truth" / f"{name}.png")
    (tmp_path / "images" / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.fixture
def maps() -> Maps:
    """Two maps in [0, 1], each reaching both ends as min-max normalised ones do."""
    scores = np.random.default_rng(0).random((2, *SIZE)).astype(np.float32)
    low, high = scores.min(axis=(1, 2), keepdims=True), scores.max(axis=(1, 2), keepdims=True)
    return np.asarray((scores - low) / (high - low))
