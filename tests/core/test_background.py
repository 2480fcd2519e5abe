"""Background rules against a loop over pixels."""

import pytest
import torch

from g4seg_pl.core.background import PowerBackground, Threshold, compose_label

MAPS = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rule", [Threshold(0.7), PowerBackground(2.0), PowerBackground(0.5)])
def test_labels_are_those_of_a_loop(rule: Threshold | PowerBackground) -> None:
    labels = compose_label(MAPS, (7, 3, 200), rule)
    assert labels.dtype == torch.uint8
    for y in range(6):
        for x in range(5):
            scores = MAPS[:, y, x].tolist()
            if isinstance(rule, Threshold):
                background = rule.value
            else:
                background = (1 - max(scores)) ** rule.power
            best = max(range(3), key=scores.__getitem__)
            assert labels[y, x] == ((7, 3, 200)[best] if scores[best] > background else 0)


def test_a_class_must_exceed_the_threshold() -> None:
    assert not compose_label(torch.full((1, 2, 2), 0.5), (1,), Threshold(0.5)).any()


def test_first_of_equal_classes_wins() -> None:
    assert (compose_label(torch.full((2, 2, 2), 0.6), (9, 5), Threshold(0.5)) == 9).all()


def test_without_maps_all_is_background() -> None:
    labels = compose_label(torch.zeros(0, 4, 3), (), Threshold())
    assert labels.shape == (4, 3)
    assert not labels.any()


@pytest.mark.parametrize("labels", [(1, 2), (0, 1, 2), (1, 2, 255)])
def test_impossible_labels_are_refused(labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="class_ids"):
        compose_label(MAPS, labels, Threshold())


def test_rules_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match=r"background threshold is 1.5"):
        Threshold(1.5)
    with pytest.raises(ValueError, match="background power is 0"):
        PowerBackground(0)
