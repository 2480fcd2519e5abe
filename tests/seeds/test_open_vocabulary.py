"""MaskCLIP and SCLIP against explicit loops over heads, pixels and names."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.background import Threshold
from g4seg_pl.features.base import CLIP_MEAN, CLIP_STD, normalise
from g4seg_pl.seeds.base import keep_ratio, resize_bilinear
from g4seg_pl.seeds.clip_model import image_statistics
from g4seg_pl.seeds.maskclip import (
    MaskClip,
    as_normalised_by,
    mask_clip_scores,
    pad_to_patches,
    value_features,
)
from g4seg_pl.seeds.open_vocabulary import imagenet_templates
from g4seg_pl.seeds.sclip import Sclip, sclip_cosines, sclip_maps
from g4seg_pl.seeds.vocabulary import (
    best_labels,
    drop_small,
    label_scores,
    make_vocabulary,
)
from g4seg_pl.seeds.windows import sliding_mean
from g4seg_pl.types import ConfigurationError, FailedSample, RefinedMask, Sample


def unit(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, 24, generator=generator), dim=-1)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def last_input(clip: Any, images: Tensor) -> Tensor:
    """The last block's input, caught on open_clip's own forward pass."""
    caught: list[Tensor] = []
    block = clip.visual.transformer.resblocks[-1]
    handle = block.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    clip.visual(normalise(images, CLIP_MEAN, CLIP_STD))
    handle.remove()
    return caught[0]


def after_attention(clip: Any, tokens: Tensor, attended: Tensor) -> Tensor:
    """What open_clip does after a block's attention, patches only, in the joint space."""
    visual = clip.visual
    block = visual.transformer.resblocks[-1]
    tokens = tokens + attended
    tokens = tokens + block.mlp(block.ln_2(tokens))
    return (visual.ln_post(tokens) @ visual.proj)[:, 1:]


def test_values_are_attention_of_each_patch_to_itself(clip: Any, images: Tensor) -> None:
    features, keys = value_features(clip.visual, images)
    tokens = last_input(clip, images)
    block = clip.visual.transformer.resblocks[-1]
    normed = block.ln_1(tokens)
    alone = torch.zeros(17, 17).fill_diagonal_(1).log()
    attended, _ = block.attn(normed, normed, normed, need_weights=False, attn_mask=alone)
    expected = after_attention(clip, tokens, attended)
    assert torch.allclose(features.flatten(2).transpose(1, 2), expected, atol=1e-5)
    weight, bias = block.attn.in_proj_weight[32:64], block.attn.in_proj_bias[32:64]
    projected = block.attn.out_proj(normed[:, 1:] @ weight.T + bias)
    assert torch.allclose(keys, projected, atol=1e-5)


def test_self_correlation_agrees_with_a_loop_over_heads(clip: Any, images: Tensor) -> None:
    texts = unit(5, 1)
    tokens = last_input(clip, images[:1])
    block = clip.visual.transformer.resblocks[-1]
    query, key, value = (
        block.ln_1(tokens)[0] @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
    ).chunk(3, dim=1)
    heads = []
    for start in (0, 16):
        q, k, v = (part[:, start : start + 16] for part in (query, key, value))
        heads.append(((q @ q.T / 4).softmax(1) + (k @ k.T / 4).softmax(1)) @ v)
    attended = block.attn.out_proj(torch.cat(heads, dim=1))[None]
    joint = functional.normalize(after_attention(clip, tokens, attended), dim=-1)
    found = sclip_cosines(clip.visual, images[:1], texts)
    assert torch.allclose(found.flatten(2).transpose(1, 2), joint @ texts.T, atol=1e-5)


def test_windows_are_averaged_pixel_by_pixel() -> None:
    image = torch.rand(1, 3, 11, 17, generator=torch.Generator().manual_seed(2))
    total, count = np.zeros((11, 17)), np.zeros((11, 17))
    for top in (0, 4, 5):
        for left in (0, 4, 8, 11):
            window = image[0, 0, top : top + 6, left : left + 6].numpy()
            total[top : top + 6, left : left + 6] += window - window.mean()
            count[top : top + 6, left : left + 6] += 1

    def centred(window: Tensor) -> Tensor:
        return window[:, :1] - window[:, :1].mean()

    found = sliding_mean(centred, image, 6, 4)
    np.testing.assert_allclose(found[0, 0].numpy(), total / count, atol=1e-6)


def test_one_window_is_the_whole_picture(clip: Any, images: Tensor) -> None:
    texts = unit(3, 1)
    whole = sclip_maps(clip.visual, images[:1], texts, crop=0)
    assert torch.equal(sclip_maps(clip.visual, images[:1], texts, crop=40, stride=8), whole)
    cosines = sclip_cosines(clip.visual, images[:1], texts)
    upright = functional.interpolate(cosines, (32, 32), mode="bilinear")
    assert torch.allclose(whole, upright[0])


def test_the_best_name_of_a_class_counts_after_the_softmax() -> None:
    words = make_vocabulary(["sky", "wall"], [["dog"], ["cat", "kitten", "tom"]])
    assert words.labels == (0, 0, 1, 2, 2, 2)
    logits = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))
    found = label_scores(logits, words, 3.0)
    probabilities = (logits * 3).softmax(0)
    for label, rows in enumerate(([0, 1], [2], [3, 4, 5])):
        assert torch.allclose(found[label], probabilities[rows].amax(0))


def test_without_background_words_label_zero_scores_nothing() -> None:
    words = make_vocabulary([], [["dog"], ["cat"]])
    found = label_scores(torch.randn(2, 3, 3), words, 1.0)
    assert not words.has_background
    assert not found[0].any()
    assert torch.allclose(found[1:].sum(0), torch.ones(3, 3))
    with pytest.raises(ConfigurationError, match=r"label values \[2\]"):
        make_vocabulary([], [["dog"], []])


def test_small_classes_and_unlikely_pixels_become_background() -> None:
    scores = torch.zeros(4, 10, 10)
    scores[1], scores[2, 0, :5], scores[3, 9, 9] = 0.5, 0.9, 0.95
    scores[0, 5:8] = 0.7
    kept = drop_small(scores, 0.05)
    assert not kept[3].any()
    assert torch.equal(kept[:3], scores[:3])
    label = best_labels(kept, 0.6)
    expected = torch.zeros(10, 10, dtype=torch.uint8)
    expected[0, :5] = 2
    assert torch.equal(label, expected)
    assert drop_small(scores, None) is scores


def test_key_smoothing_and_prompt_denoising_by_hand() -> None:
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(1, 24, 2, 3, generator=generator)
    keys, texts = torch.randn(1, 6, 8, generator=generator), unit(4, 2)
    plain = mask_clip_scores(features, keys, texts)[0].flatten(1)
    cosines = functional.normalize(features[0].flatten(1), dim=0).T @ texts.T
    assert torch.allclose(plain.T, cosines, atol=1e-6)
    probabilities = (plain * 100).softmax(0)
    bar = float(probabilities.amax(1).sort().values[1:3].mean())
    denoised = mask_clip_scores(features, keys, texts, prompt_denoising=bar)[0].flatten(1)
    gone = probabilities.amax(1) < bar
    assert 0 < gone.sum() < 4
    assert torch.equal(denoised[gone], torch.full_like(denoised[gone], -100.0))
    assert torch.equal(denoised[~gone], plain[~gone])
    smooth = mask_clip_scores(features, keys, texts, key_smoothing=0.9)[0].flatten(1).T
    units = keys[0] / keys[0].norm(dim=0)
    unsure = probabilities.amax(0) < 0.9
    mixed = units @ units.T @ probabilities.T
    assert torch.allclose(smooth[unsure], mixed[unsure], atol=1e-5)
    assert torch.allclose(smooth[~unsure], probabilities.T[~unsure], atol=1e-6)


@pytest.mark.parametrize("mean", [CLIP_MEAN, (0.5, 0.5, 0.5)])
def test_padding_is_nought_after_normalisation(mean: tuple[float, float, float]) -> None:
    padded = pad_to_patches(torch.rand(1, 3, 10, 16), (8, 8), mean)
    assert padded.shape == (1, 3, 16, 16)
    assert normalise(padded, mean, CLIP_STD)[:, :, 10:].abs().max() < 1e-5


def test_a_model_sees_pixels_by_the_statistics_that_are_asked_for() -> None:
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    visual = SimpleNamespace(image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.1))
    changed = as_normalised_by(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), visual)
    seen = normalise(changed, *image_statistics(visual))
    grey = (image + 1) * 127.5
    expected = (grey - torch.tensor([123.675, 116.28, 103.53])[:, None, None]) / torch.tensor(
        [58.395, 57.12, 57.375]
    )[:, None, None]
    assert torch.allclose(seen, expected, atol=1e-5)


def test_sizes_keep_the_ratio_within_both_bounds() -> None:
    assert keep_ratio((375, 500), 336) == (336, 448)
    assert keep_ratio((100, 2000), 336) == (102, 2048)
    assert keep_ratio((375, 500), 520, 520) == (390, 520)  # MaskCLIP on Context
    picture = torch.randint(0, 256, (3, 10, 12), dtype=torch.uint8)
    grown = (resize_bilinear(picture, (20, 24)) + 1) * 127.5
    assert torch.allclose(grown, grown.round(), atol=1e-4)


def test_there_are_eighty_templates() -> None:
    templates = imagenet_templates()
    assert len(templates) == len(set(templates)) == 80
    assert all(template.count("{}") == 1 for template in templates)


MAKERS = [
    lambda folder, **more: MaskClip(folder, short_side=40, **more),
    lambda folder, **more: MaskClip(
        folder, short_side=40, long_side=44, statistics="imagenet", **more
    ),
    lambda folder, **more: MaskClip(folder, short_side=40, key_smoothing=1.0, **more),
    lambda folder, **more: Sclip(folder, short_side=40, crop=32, stride=16, **more),
]


@pytest.mark.parametrize("make", MAKERS)
def test_names_every_pixel_without_being_told_the_classes(
    make: Any, worded_clip_folder: Path, sample: Sample
) -> None:
    maker = make(
        str(worded_clip_folder),
        class_names=[["dog"], ["cat", "zebra"], ["car"]],
        background_words=["brick", "block"],
        templates=["a photo of a {}"],
    )
    maker.configure_model()
    (made,) = maker.predict_step([sample])
    assert isinstance(made, RefinedMask)
    assert made.label.shape == (40, 53)
    assert set(made.label.unique().tolist()) - {0} == set(made.class_ids) <= {1, 2, 3}
    assert made.foreground.shape == (len(made.class_ids), 40, 53)
    for label, scores in zip(made.class_ids, made.foreground, strict=True):
        assert (scores[made.label == label] >= scores.mean()).float().mean() > 0.5


def test_a_threshold_stands_in_for_a_nameless_background(
    worded_clip_folder: Path, sample: Sample
) -> None:
    options: dict[str, Any] = {"class_names": [["dog"], ["cat"]], "templates": ["{}"]}
    every = MaskClip(str(worded_clip_folder), background=Threshold(0.0), **options)
    nothing = MaskClip(str(worded_clip_folder), background=Threshold(1.0), **options)
    for maker, expected in ((every, True), (nothing, False)):
        maker.configure_model()
        (made,) = maker.predict_step([sample])
        assert isinstance(made, RefinedMask)
        assert bool(made.label.all()) is expected
        assert bool(made.class_ids) is expected


def test_without_names_and_data_module_the_run_is_refused(
    worded_clip_folder: Path, sample: Sample
) -> None:
    maker = Sclip(str(worded_clip_folder))
    maker.configure_model()
    (failed,) = maker.predict_step([sample])
    assert isinstance(failed, FailedSample)
    assert "class_names" in failed.error
