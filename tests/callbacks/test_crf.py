"""Dense CRF: presets as published, invariances, and the callback's effect on a mask."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from g4seg_pl.callbacks.crf import CRFSettings, DenseCRF, Preset, dense_crf, preset, sharpen
from g4seg_pl.core.background import BackgroundRule, PowerBackground, Threshold
from g4seg_pl.types import ConfigurationError, FailedSample, RefinedMask, Sample, Seed

pytest.importorskip("pydensecrf")

SMALL = CRFSettings().scaled(0.1)

# As the projects' code has them: width and weight of the smoothness kernel; width in pixels, width
# in colour and weight of the appearance kernel; the unary.
PUBLISHED: dict[str, tuple[float, float, float, float, float, str]] = {
    "clip_es": (1, 3, 67, 3, 4, "softmax"),
    "more": (1, 3, 67, 3, 4, "softmax"),
    "irn": (3, 3, 50, 5, 10, "labels"),
    "seam": (3, 3, 80, 13, 10, "softmax"),
    "mctformer": (4, 3, 83, 5, 3, "softmax"),
    "weaktr": (4, 3, 83, 5, 3, "labels"),
    "weaktr_online": (3, 3, 83, 5, 3, "softmax"),
    "toco": (3, 3, 36, 3, 4, "scores"),
    "toco_seg": (1, 1, 121, 5, 4, "softmax"),
    "afa": (3, 3, 64, 5, 4, "softmax"),
}


def two_halves() -> tuple[np.ndarray, np.ndarray]:
    """A picture of two colours, and a noisy guess of which half is foreground."""
    image = np.zeros((24, 32, 3), np.uint8)
    image[:, 16:] = 200
    rng = np.random.default_rng(0)
    guess = np.clip((np.arange(32) >= 16) * 0.4 + 0.3 + 0.3 * (rng.random((24, 32)) - 0.5), 0, 1)
    return image, np.stack([1 - guess, guess])


def test_clip_es_preset_is_that_of_its_code() -> None:
    assert preset("clip_es") == CRFSettings(1, 3, 67, 3, 4, iterations=10)
    assert preset("irn").unary == "labels"


@pytest.mark.parametrize("name", get_args(Preset))
def test_preset_has_the_numbers_its_project_has(name: Preset) -> None:
    found = preset(name)
    kernels = (found.gaussian_width, found.gaussian_weight, found.bilateral_width)
    appearance = (found.bilateral_colour, found.bilateral_weight)
    assert (*kernels, *appearance, found.unary) == PUBLISHED[name]
    assert found.iterations == 10
    assert found.unary == "softmax" or found.label_confidence == 0.7


def test_every_setting_reaches_the_field_in_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydensecrf.densecrf

    field = MagicMock()
    field.inference.return_value = np.zeros((2, 24 * 32))
    image, probabilities = two_halves()
    monkeypatch.setattr(pydensecrf.densecrf, "DenseCRF2D", MagicMock(return_value=field))
    dense_crf(image, probabilities, CRFSettings(1.5, 2.5, 33, 7, 5, iterations=3))
    appearance = dict(field.addPairwiseBilateral.call_args.kwargs)
    np.testing.assert_array_equal(appearance.pop("rgbim"), image)
    assert appearance == {"sxy": 33, "srgb": 7, "compat": 5}
    field.addPairwiseGaussian.assert_called_once_with(sxy=1.5, compat=2.5)
    field.inference.assert_called_once_with(3)


def test_colour_width_is_in_units_of_colour() -> None:
    """A picture twice as bright, seen at twice the colour width, is the same picture."""
    image, probabilities = two_halves()
    image //= 50  # 0 and 4: about as far apart as the width, so that it matters
    once = replace(SMALL, iterations=1)
    wider = replace(once, bilateral_colour=2 * once.bilateral_colour)
    found = dense_crf(image, probabilities, once)
    np.testing.assert_allclose(dense_crf(2 * image, probabilities, wider), found, atol=1e-4)
    assert np.abs(dense_crf(2 * image, probabilities, once) - found).max() > 0.01


def test_labels_are_right_with_the_confidence_given() -> None:
    """Nothing smoothed, the winner of three has 0.7 and the others share the rest."""
    rng = np.random.default_rng(1)
    image, probabilities = two_halves()[0], rng.random((3, 24, 32))
    alone = replace(preset("irn"), gaussian_weight=0, bilateral_weight=0)
    for confidence in (0.7, 0.9):
        found = dense_crf(image, probabilities, replace(alone, label_confidence=confidence))
        won = np.arange(3)[:, None, None] == probabilities.argmax(0)
        expected = np.where(won, confidence, (1 - confidence) / 2)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert preset("irn").label_confidence == 0.7


def test_preset_that_takes_scores_is_tocos_own_unary() -> None:
    """Against pydensecrf itself, called as ToCo's `crf_inference_infer` is on a softmax."""
    import pydensecrf.densecrf as field
    from pydensecrf.utils import unary_from_softmax
    from scipy.special import softmax

    image, probabilities = two_halves()
    settings = preset("toco").scaled(0.1)
    crf = field.DenseCRF2D(32, 24, 2)
    crf.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(softmax(probabilities, axis=0))))
    crf.addPairwiseGaussian(sxy=settings.gaussian_width, compat=3)
    crf.addPairwiseBilateral(sxy=settings.bilateral_width, srgb=3, rgbim=image, compat=4)
    expected = np.array(crf.inference(10)).reshape(2, 24, 32)
    np.testing.assert_allclose(dense_crf(image, probabilities, settings), expected, atol=1e-5)
    alone = replace(settings, gaussian_weight=0, bilateral_weight=0)
    unsmoothed = dense_crf(image, probabilities, alone)
    np.testing.assert_allclose(unsmoothed, softmax(probabilities, axis=0), atol=1e-5)


def test_preset_that_takes_labels_sees_only_who_wins() -> None:
    image, probabilities = two_halves()
    surer = np.where(probabilities > 0.5, 0.99, 0.01)
    settings = preset("irn").scaled(0.1)
    found = dense_crf(image, probabilities, settings)
    np.testing.assert_array_equal(found.argmax(0), (image[..., 0] > 0).astype(int))
    np.testing.assert_array_equal(dense_crf(image, surer, settings), found)
    # Not so where probabilities themselves are taken.
    soft = replace(settings, unary="softmax", bilateral_weight=0, gaussian_weight=0)
    assert np.abs(dense_crf(image, surer, soft) - dense_crf(image, probabilities, soft)).max() > 0.1


def test_more_uses_the_numbers_of_clip_es() -> None:
    assert preset("more") == preset("clip_es")
    assert DenseCRF("more").effective_settings == preset("more")


def test_negative_number_of_processes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="processes is -1"):
        DenseCRF(processes=-1)


def test_scaling_changes_widths_in_pixels_only() -> None:
    scaled = preset("seam").scaled(0.5)
    assert (scaled.gaussian_width, scaled.bilateral_width) == (1.5, 40)
    assert (scaled.bilateral_colour, scaled.bilateral_weight) == (13, 10)


def test_settings_by_hand_are_scaled_as_a_presets_are() -> None:
    own = DenseCRF(scale=0.5, settings=CRFSettings(2, 3, 40, 13, 10))
    assert own.effective_settings == CRFSettings(1, 3, 20, 13, 10)
    assert DenseCRF("seam", scale=0.5).effective_settings == preset("seam").scaled(0.5)


def test_marginals_sum_to_one_and_follow_the_colours() -> None:
    image, probabilities = two_halves()
    marginals = dense_crf(image, probabilities, SMALL)
    np.testing.assert_allclose(marginals.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(marginals.argmax(0), (image[..., 0] > 0).astype(int))


def test_common_factor_of_the_probabilities_changes_nothing() -> None:
    image, probabilities = two_halves()
    whole, half = (dense_crf(image, factor * probabilities, SMALL) for factor in (1, 0.5))
    np.testing.assert_allclose(whole, half, atol=1e-4)


def test_without_smoothing_the_probabilities_come_back() -> None:
    image, probabilities = two_halves()
    plain = CRFSettings(gaussian_weight=0, bilateral_weight=0)
    np.testing.assert_allclose(dense_crf(image, probabilities, plain), probabilities, atol=1e-4)


def test_image_of_another_size_is_refused() -> None:
    image, probabilities = two_halves()
    with pytest.raises(ValueError, match="image must be uint8"):
        dense_crf(image[:5], probabilities, SMALL)


def test_sharpened_mask_keeps_its_class_ids() -> None:
    image, probabilities = two_halves()
    maps = torch.from_numpy(probabilities[1:]).float()
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    sample = Sample("a", pixels, Seed((7,), maps), ("dog",))
    mask = RefinedMask("a", (7,), maps, torch.zeros(24, 32, dtype=torch.uint8))
    sharpened = sharpen(sample, mask, Threshold(0.5), SMALL)
    assert sharpened.label.unique().tolist() == [0, 7]
    assert sharpened.foreground.shape == maps.shape


def batch_of(count: int) -> tuple[list[Any], list[Any]]:
    """Items and masks, the second of which failed."""
    image, probabilities = two_halves()
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    items: list[Any] = []
    masks: list[Any] = []
    for index in range(count):
        maps = torch.from_numpy(np.roll(probabilities[1:], index, axis=2).copy()).float()
        items.append(Sample(str(index), pixels, Seed((7,), maps), ("dog",)))
        masks.append(RefinedMask(str(index), (7,), maps, torch.zeros(24, 32, dtype=torch.uint8)))
    items[1] = masks[1] = FailedSample("1", "unreadable")
    return items, masks


@pytest.mark.parametrize("hook", ["on_predict_batch_end", "on_test_batch_end"])
@pytest.mark.parametrize("rule", [Threshold(0.2), Threshold(0.8), PowerBackground(3)])
def test_background_competes_by_the_rule_of_the_run(rule: BackgroundRule, hook: str) -> None:
    """Nothing smoothed, a marginal is the class's share of its own and the background's score."""
    items, masks = batch_of(3)
    before = masks[0].foreground
    callback = DenseCRF(settings=CRFSettings(gaussian_weight=0, bilateral_weight=0))
    outputs = masks if hook == "on_predict_batch_end" else {"outcomes": masks}
    getattr(callback, hook)(None, SimpleNamespace(background=rule), outputs, items)
    left = rule.value if isinstance(rule, Threshold) else (1 - before) ** 3
    torch.testing.assert_close(masks[0].foreground, before / (before + left), rtol=0, atol=1e-4)
    assert torch.equal(masks[0].label == 7, (before > left)[0])
    # The rule decides somewhere: 0.5 would have labelled other pixels.
    assert not torch.equal(masks[0].label == 7, (before > 0.5)[0])


def test_processes_give_what_the_main_process_gives() -> None:
    module: Any = SimpleNamespace(background=Threshold(0.5))
    found = []
    for processes in (0, 2):
        items, masks = batch_of(4)
        callback = DenseCRF(settings=SMALL, processes=processes)
        callback.on_predict_batch_end(None, module, masks, items)  # type: ignore[arg-type]
        callback.teardown(None, module, "predict")  # type: ignore[arg-type]
        found.append(masks)
    assert found[0][1] == found[1][1]
    for plain, pooled in zip(found[0][::2], found[1][::2], strict=True):
        assert plain.label.any()
        torch.testing.assert_close(plain.foreground, pooled.foreground, rtol=0, atol=0)
        assert torch.equal(plain.label, pooled.label)
