"""The distribution read from foreground maps always agrees with the labels made of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from g4seg_pl.core.background import PowerBackground, Threshold, compose_label
from g4seg_pl.segmentation.soft_targets import (
    SoftReading,
    class_distribution,
    place_labels,
    reading_of,
)
from g4seg_pl.types import ConfigurationError


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 4),
    rule=st.one_of(st.floats(0.05, 0.95).map(Threshold), st.floats(0.2, 6.0).map(PowerBackground)),
)
def test_most_probable_label_is_the_rules_label(
    seed: int, count: int, rule: Threshold | PowerBackground
) -> None:
    foreground = torch.rand(count, 6, 7, generator=torch.Generator().manual_seed(seed))
    distribution = class_distribution(foreground, SoftReading(background=rule))
    assert torch.allclose(distribution.sum(0), torch.ones(6, 7))
    assert distribution.min() >= 0
    labels = compose_label(foreground, range(1, count + 1), rule)
    # Ties within rounding may go either way.
    top = distribution.topk(2, dim=0).values
    clear = (top[0] - top[1]) > 1e-5
    assert torch.equal(distribution.argmax(0)[clear], labels.long()[clear])


def test_one_class_at_a_threshold_of_a_half_is_taken_as_it_is() -> None:
    foreground = torch.rand(1, 5, 5)
    distribution = class_distribution(foreground, SoftReading())
    assert torch.allclose(distribution[1], foreground[0], atol=1e-6)


def test_marginals_leave_the_background_what_is_missing() -> None:
    whole = torch.rand(4, 5, 5).softmax(0)
    distribution = class_distribution(whole[1:], SoftReading(marginals=True))
    assert torch.allclose(distribution, whole, atol=1e-6)


def test_no_class_is_all_background() -> None:
    distribution = class_distribution(torch.zeros(0, 3, 4), SoftReading())
    assert torch.equal(distribution, torch.ones(1, 3, 4))


def test_classes_are_put_in_their_places() -> None:
    planes = torch.rand(2, 3, 2, 2) + 1
    labels = [(0, 5, 2), (0, 6)]
    placed = place_labels(planes, labels, 7)
    assert placed.shape == (2, 7, 2, 2)
    for image in range(2):
        for value in range(7):
            plane = placed[image, value]
            if value in labels[image]:
                assert torch.equal(plane, planes[image, labels[image].index(value)])
            else:
                assert not plane.any()


def record(rule: str, *changed_by: str) -> dict[str, object]:
    """A run record of a background rule and callbacks."""
    init = {"background": {"class_path": rule, "init_args": {"power": 2.0}}}
    entries = [{"class_path": name, "init_args": {}} for name in changed_by]
    return {"config": {"model": {"init_args": init}, "changed_by": entries}}


def test_reading_is_found_in_the_run_record() -> None:
    rule = "g4seg_pl.core.background.PowerBackground"
    assert reading_of(record(rule)) == SoftReading(background=PowerBackground(2.0))
    assert reading_of(record(rule, "g4seg_pl.callbacks.crf.DenseCRF")).marginals
    assert reading_of({"config": {"model": {"init_args": {"marginals": True}}}}).marginals


@pytest.mark.parametrize("content", [{}, record("their.Rule")])
def test_unknown_rules_are_refused(content: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"background rule.*data\.soft"):
        reading_of(content)


def test_labels_made_by_names_of_the_background_are_no_soft_targets() -> None:
    content = record("g4seg_pl.core.background.PowerBackground")
    model = {"class_path": "g4seg_pl.seeds.sclip.Sclip"} | content["config"]["model"]  # type: ignore[index]
    model["init_args"]["background_words"] = ["sky"]
    with pytest.raises(ConfigurationError, match=r"Sclip scored.*data\.soft"):
        reading_of({"config": {"model": model, "changed_by": []}})
    model["init_args"]["background_words"] = None
    found = reading_of({"config": {"model": model, "changed_by": []}})
    assert found == SoftReading(background=PowerBackground(2.0))
