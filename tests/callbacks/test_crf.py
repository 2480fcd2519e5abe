"""Dense CRF: presets as published, invariances, and the callback's effect on a mask."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from g4seg_pl.callbacks.crf import CRFSettings, DenseCRF, dense_crf, preset, sharpen
from g4seg_pl.core.background import Threshold
from g4seg_pl.types import ConfigurationError, FailedSample, RefinedMask, Sample, Seed

pytest.importorskip("pydensecrf")

SMALL = CRFSettings().scaled(0.1)


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
