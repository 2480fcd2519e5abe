"""Seed and refined masks scored side by side, at the size of COCO."""

import pickle

import numpy as np
import pytest

from g4seg_pl.evaluation.bootstrap import paired_gain
from g4seg_pl.evaluation.confusion import confusion_matrix, mean_iou
from g4seg_pl.evaluation.paired import PairedScores


def label_maps(count: int, classes: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Truth with 255 in it, and two predictions, the second nearer to it."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        truth = rng.integers(0, classes, (12, 15))
        near, far = (np.where(rng.random(truth.shape) < p, truth, 0) for p in (0.9, 0.4))
        found.append((far, near, np.where(rng.random(truth.shape) < 0.1, 255, truth)))
    return found


def test_scores_are_those_of_the_matrices() -> None:
    maps, scores = label_maps(6, 5), PairedScores(5)
    other = PairedScores(5)
    for index, (seed, refined, truth) in enumerate(maps):
        (scores if index < 4 else other).add(str(index), seed, refined, truth)
    scores.update([pickle.loads(pickle.dumps(other)), other])
    before, after = (
        np.stack([confusion_matrix(each[place], each[2], 5) for each in maps]) for place in (0, 1)
    )
    found, gain = scores.summary(100), paired_gain(before, after, 100)
    assert found["seed_miou"] == pytest.approx(100 * mean_iou(before))
    assert found["refined_miou"] == pytest.approx(100 * mean_iou(after))
    assert found["gain"] == pytest.approx(100 * gain.value)
    assert found["gain_se"] == pytest.approx(100 * gain.standard_error)
    assert found["n_images"] == 6


def test_each_boundary_score_is_of_its_own_masks() -> None:
    """The seeds are squares 2 pixels off, but for one in its place; all refined masks are right.

    For the counts see the shifted square in test_evaluate.py: 36 of 116 pixels of a band of class
    1 agree and 196 of 284 of class 0; of the square in its place all 76 and 240.
    """
    truth = np.zeros((40, 40), np.uint8)
    truth[10:30, 10:30] = 1
    scores = PairedScores(2)
    for name, shift in (("a", 2), ("b", 2), ("c", 0)):
        scores.add(name, np.roll(truth, shift, axis=1), truth, truth)
    found = scores.summary(10)
    bands = [(2 * 36 + 76) / (2 * 116 + 76), (2 * 196 + 240) / (2 * 284 + 240)]
    assert found["seed_boundary_iou"] == pytest.approx(100 * np.mean(bands))
    assert found["refined_boundary_iou"] == pytest.approx(100)


def test_an_image_takes_little_memory() -> None:
    scores, images = PairedScores(81), 20
    for index, (seed, refined, truth) in enumerate(label_maps(images, 81)):
        scores.add(f"COCO_train2014_{index:012d}", seed, refined, truth)
    assert len(pickle.dumps(scores)) < images * 7000
