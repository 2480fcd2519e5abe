"""What is written for CLIP-ES and IRN scores the same by their evaluation rules as by ours.

The rules are written out here from the projects' descriptions of themselves: linyq2117/CLIP-ES
@3893f817 `eval_cam.py` and jiwoon-ahn/irn @a2ece00 `step/eval_cam.py`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from datamodules.convert import main as convert
from datamodules.seed_files import read_seed, write_seed
from g4seg_pl.core.background import BackgroundRule, PowerBackground, Threshold, compose_label
from g4seg_pl.evaluation.evaluate import evaluate

SIZES = ((40, 52), (64, 48), (33, 70), (50, 50))
CLASSES = ((3,), (15, 12), (9, 15, 3), (20,))
Labels = NDArray[np.uint8]


def smooth(generator: torch.Generator, count: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """Smooth random maps, each from 0 to 1."""
    maps = interpolate(torch.rand(1, count, 6, 7, generator=generator), size, mode="bicubic")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return np.asarray(((maps - low) / (high - low)).numpy())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Ground truth with an ignored strip, and maps that half agree with it, for four images."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "gt").mkdir()
    for index, (size, classes) in enumerate(zip(SIZES, CLASSES, strict=True)):
        exact = smooth(generator, len(classes), size)
        truth = compose_label(torch.from_numpy(exact), classes, Threshold(0.5)).numpy()
        truth[:3] = 255
        Image.fromarray(truth).save(tmp_path / "gt" / f"{index}.png")
        maps = 0.6 * exact + 0.4 * smooth(generator, len(classes), size)
        maps /= maps.max(axis=(1, 2), keepdims=True)
        for dialect in ("clip_es", "irn"):
            write_seed(tmp_path / dialect / f"{index}.npy", classes, maps, dialect)
    return tmp_path


def fields(path: Path) -> dict[str, NDArray[np.generic]]:
    """As both projects read their files."""
    content: dict[str, NDArray[np.generic]] = np.load(path, allow_pickle=True).item()
    return content


def clip_es_label(path: Path, power: float) -> Labels:
    """Below 1 the power is a constant background; from 1 on the background is (1 - max)^power."""
    cams, keys = fields(path)["attn_highres"], fields(path)["keys"]
    background = np.power(1 - np.max(cams, axis=0, keepdims=True), power)
    if power < 1:
        background = np.full_like(background, power)
    winner = np.concatenate([background, cams]).argmax(axis=0)
    return np.array([0, *(keys + 1)], dtype=np.uint8)[winner]


def irn_label(path: Path, threshold: float) -> Labels:
    """A constant background, in the array's own precision."""
    cams, keys = fields(path)["high_res"], fields(path)["keys"]
    background = np.full((1, *cams.shape[1:]), threshold, dtype=cams.dtype)
    return np.array([0, *(keys + 1)], dtype=np.uint8)[np.concatenate([background, cams]).argmax(0)]


def miou(labels: list[Labels], truths: list[Labels], *, need_truth: bool) -> float:
    """In percent, over the pooled confusion, class by class with plain loops.

    CLIP-ES leaves out classes that the truth does not have, IRN those of neither.
    """
    ious = []
    for label in range(21):
        pairs = [
            (p[t != 255] == label, t[t != 255] == label)
            for p, t in zip(labels, truths, strict=True)
        ]
        both = sum(int((p & t).sum()) for p, t in pairs)
        either = sum(int((p | t).sum()) for p, t in pairs)
        if sum(int(t.sum()) for _, t in pairs) or (either and not need_truth):
            ious.append(both / either)
    return 100 * sum(ious) / len(ious)


def our_miou(tree: Path, masks: Path) -> float:
    evaluate(masks, tree / "gt", 21, tree / "scores.json")
    value: float = json.loads((tree / "scores.json").read_text())["miou"]
    return value


def our_masks(tree: Path, dialect: str, rule: BackgroundRule) -> Path:
    """Label files as a run's writer makes them of what was read."""
    (tree / "masks").mkdir(exist_ok=True)
    for index, size in enumerate(SIZES):
        seed = read_seed(tree / dialect / f"{index}.npy", size, 20)
        label = compose_label(seed.scores, seed.class_ids, rule)
        Image.fromarray(label.numpy()).save(tree / "masks" / f"{index}.png")
    return tree / "masks"


def truths(tree: Path) -> list[Labels]:
    return [np.array(Image.open(tree / "gt" / f"{index}.png")) for index in range(len(SIZES))]


@pytest.mark.parametrize(
    ("power", "rule"),
    [(1, PowerBackground(1)), (2, PowerBackground(2)), (0.4, Threshold(0.4))],
)
def test_clip_es(power: float, rule: BackgroundRule, tree: Path) -> None:
    labels = [clip_es_label(tree / "clip_es" / f"{index}.npy", power) for index in range(4)]
    theirs = miou(labels, truths(tree), need_truth=True)
    ours = our_miou(tree, our_masks(tree, "clip_es", rule))
    # They take the background to a power in half precision: a tie may fall the other way.
    assert ours == pytest.approx(theirs, abs=0.02)
    assert 30 < ours < 95


@pytest.mark.parametrize("threshold", [0.15, 0.5])
def test_irn(threshold: float, tree: Path) -> None:
    labels = [irn_label(tree / "irn" / f"{index}.npy", threshold) for index in range(4)]
    theirs = miou(labels, truths(tree), need_truth=False)
    ours = our_miou(tree, our_masks(tree, "irn", Threshold(threshold)))
    assert ours == pytest.approx(theirs, abs=0.02)
    assert 30 < ours < 95


@pytest.mark.parametrize("dialect", ["clip_es", "irn"])
def test_converted_label_files_score_the_same(dialect: str, tree: Path) -> None:
    words = ["--from", dialect, "--to", "png", "--background", "0.5"]
    assert convert([*words, str(tree / dialect), str(tree / "png")]) == 0
    labels = [irn_label(tree / "irn" / f"{index}.npy", 0.5) for index in range(4)]
    theirs = miou(labels, truths(tree), need_truth=False)
    assert our_miou(tree, tree / "png") == pytest.approx(theirs, abs=1e-9)
