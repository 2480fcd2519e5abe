"""Pixels that a mask is not sure of are 255 in its file, by each criterion and by their union."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from g4seg_pl import G4SegModule
from g4seg_pl.callbacks.crf import DenseCRF
from g4seg_pl.callbacks.ignore import IgnoreUncertain
from g4seg_pl.core.background import BackgroundRule, PowerBackground, Threshold, compose_label
from g4seg_pl.seeds.maskclip import MaskClip
from g4seg_pl.types import ConfigurationError, FailedSample, RefinedMask

IDS = (3, 1)


def mask_of(rule: BackgroundRule, seed: int = 0, ids: tuple[int, ...] = IDS) -> RefinedMask:
    """Random maps of some classes, labelled by a rule."""
    maps = torch.rand(len(ids), 9, 11, generator=torch.Generator().manual_seed(seed))
    return RefinedMask("a", ids, maps, compose_label(maps, ids, rule))


def ready(callback: IgnoreUncertain, module: Any, *before: DenseCRF) -> IgnoreUncertain:
    """The callback as a trainer sets it up."""
    trainer: Any = SimpleNamespace(callbacks=[*before, callback])
    callback.setup(trainer, module, "predict")
    return callback


def labels_after(callback: IgnoreUncertain, mask: RefinedMask) -> np.ndarray[Any, Any]:
    outputs = [FailedSample("b", "unreadable"), mask]
    callback.on_predict_batch_end(None, None, outputs)  # type: ignore[arg-type]
    assert outputs[0] == FailedSample("b", "unreadable")
    after = outputs[1]
    assert isinstance(after, RefinedMask)
    assert torch.equal(after.foreground, mask.foreground)
    return after.label.numpy()


@given(seed=st.integers(0, 1000), value=st.floats(0.1, 0.9), least=st.floats(0.5, 0.99))
def test_probability_is_that_of_the_odds_at_the_threshold(
    seed: int, value: float, least: float
) -> None:
    """Worked out for one class: the label's odds against the other, the threshold even."""
    mask = mask_of(Threshold(value), seed, (7,))
    module = G4SegModule("model", background=Threshold(value))
    found = labels_after(ready(IgnoreUncertain(least), module), mask)
    score = mask.foreground[0].double().numpy()
    odds = score / (1 - score) * (1 - value) / value
    sure = np.maximum(odds, 1 / odds) / (1 + np.maximum(odds, 1 / odds))
    expected = np.where(sure < least, 255, mask.label.numpy())
    clear = np.abs(sure - least) > 1e-5
    np.testing.assert_array_equal(found[clear], expected[clear])


def test_probability_behind_a_dense_crf_is_the_largest_marginal() -> None:
    """As CLIP-ES does it, background being what the classes leave."""
    whole = torch.randn(3, 9, 11, generator=torch.Generator().manual_seed(0)).mul(2).softmax(0)
    label = torch.tensor([0, *IDS], dtype=torch.uint8)[whole.argmax(0)]
    mask = RefinedMask("a", IDS, whole[1:], label)
    module = G4SegModule("model", background=PowerBackground(3))
    found = labels_after(ready(IgnoreUncertain(0.95), module, DenseCRF()), mask)
    expected = np.where(whole.amax(0).numpy() < 0.95, 255, label.numpy())
    np.testing.assert_array_equal(found, expected)
    assert 0 < (found == 255).mean() < 1


def test_band_and_weight_and_their_union() -> None:
    mask = replace(mask_of(Threshold(0.5)), pixel_weights=torch.rand(2, 9, 11))
    assert mask.pixel_weights is not None
    module = G4SegModule("model")
    band = labels_after(ready(IgnoreUncertain(between=(0.25, 0.7)), module), mask)
    weight = labels_after(ready(IgnoreUncertain(least_weight=0.4), module), mask)
    both = IgnoreUncertain(between=(0.25, 0.7), least_weight=0.4)
    for row in range(9):
        for column in range(11):
            label = int(mask.label[row, column])
            top = float(mask.foreground[:, row, column].max())
            expected = 255 if 0.25 < top < 0.7 else label
            assert band[row, column] == expected
            known = 1.0 if label == 0 else float(mask.pixel_weights[IDS.index(label), row, column])
            assert weight[row, column] == (255 if known < 0.4 else label)
    union = np.where(weight == 255, 255, band)
    np.testing.assert_array_equal(labels_after(ready(both, module), mask), union)


def test_what_lies_just_at_a_limit_is_kept() -> None:
    maps = torch.tensor([[[0.25, 0.375, 0.75, 0.875]]])
    label = torch.full((1, 4), 3, dtype=torch.uint8)
    mask = RefinedMask("a", (3,), maps, label, pixel_weights=maps)
    module = G4SegModule("model")
    band = labels_after(ready(IgnoreUncertain(between=(0.25, 0.75)), module), mask)
    assert band.tolist() == [[3, 255, 3, 3]]
    weight = labels_after(ready(IgnoreUncertain(least_weight=0.75), module), mask)
    assert weight.tolist() == [[255, 255, 3, 3]]
    # One class behind a dense CRF: its own marginal and what is left.
    probability = labels_after(ready(IgnoreUncertain(0.75), module, DenseCRF()), mask)
    assert probability.tolist() == [[255, 255, 3, 3]]


def test_an_image_without_classes_is_background() -> None:
    empty = RefinedMask("a", (), torch.zeros(0, 4, 5), torch.zeros(4, 5, dtype=torch.uint8))
    callback = ready(IgnoreUncertain(0.99, (0.0, 1.0), 0.5), G4SegModule("model"))
    assert not labels_after(callback, empty).any()


@pytest.mark.parametrize(
    "settings",
    [{}, {"least_probability": 95}, {"between": (0.7, 0.25)}, {"least_weight": -0.1}],
)
def test_what_is_no_criterion_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"IgnoreUncertain.*give"):
        IgnoreUncertain(**settings)


def test_a_crf_behind_it_and_weights_that_no_step_made_are_refused() -> None:
    callback = IgnoreUncertain(least_weight=0.5)
    trainer: Any = SimpleNamespace(callbacks=[callback, DenseCRF()])
    with pytest.raises(ConfigurationError, match="list it before IgnoreUncertain"):
        callback.setup(trainer, G4SegModule("model"), "predict")
    with pytest.raises(ConfigurationError, match="ChooseByLikelihood"):
        callback.uncertain(mask_of(Threshold(0.5)))


def test_probabilities_against_named_backgrounds_are_refused() -> None:
    """Their labels were made of maps that are not in the mask."""
    module = MaskClip("model", background_words=["sky"])
    with pytest.raises(ConfigurationError, match="give IgnoreUncertain another criterion"):
        ready(IgnoreUncertain(0.95), module)
    ready(IgnoreUncertain(between=(0.25, 0.7)), module)
