"""Grounding against DiffSegmenter's maker, its mixing by hand, its cost, and what it leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.generation import noised, rows_per_class
from g4seg_pl.core.grounding import Grounding
from g4seg_pl.core.guided import bring_up
from g4seg_pl.core.refine import refine
from g4seg_pl.core.threshold import centre_threshold
from g4seg_pl.seeds.diffsegmenter import DiffSegmenter
from g4seg_pl.types import Sample, Seed

SceneMaker = Callable[..., RefinementContext]


def _masks(count: int) -> Tensor:
    return torch.rand(count, 64, 64, generator=torch.Generator().manual_seed(5))


def _word_maps(context: RefinementContext, **options: Any) -> Tensor:
    """G: with λ = 1 and the threshold in the middle nothing of the mask is left."""
    return Grounding(mixing=1.0, **options)(_masks(len(context.owner)), context)


def test_word_maps_are_those_of_diffsegmenter(sd1_folder: Path) -> None:
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(1))
    names = ("dog", "potted plant")
    generator = StableDiffusion.from_pretrained(str(sd1_folder))
    context = RefinementContext(
        images=image[None].float() / 127.5 - 1,
        image_ids=("a picture",),
        class_names=names,
        owner=torch.tensor([0, 0]),
        generator=generator,
        prompt_template="a photograph of {}",
    )
    found = _word_maps(context)

    maker = DiffSegmenter(str(sd1_folder), emphasis=1.0)
    maker.generator = generator
    seed = Seed((1, 2), torch.zeros(2, 64, 64))
    sample = Sample("a picture", image.to(torch.uint8), seed, names)
    assert generator.image_size == 64
    expected = maker.make(sample).foreground
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3


def _to_unit_range(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)


@pytest.mark.parametrize("upsampling", ["bilinear", "guided", "joint_bilateral"])
def test_word_maps_are_the_weighted_sum_of_levels_brought_up_as_asked(
    upsampling: Any, scene: SceneMaker
) -> None:
    context, weights = scene(), {(4, 4): 0.2, (8, 8): 0.7, (16, 16): 0.1}
    rows = rows_per_class(_masks(4), context, own_noise=False)
    with torch.no_grad():
        noisy, _ = noised(rows, context, 300)
        _, records = context.generator.attention(noisy, 300, context.embed(rows.prompts))
    assert {record.grid for record in records} == set(weights)
    coarse = torch.zeros(4, 16, 16)
    for grid, weight in weights.items():
        told = []
        for record in (each for each in records if each.grid == grid):
            attention = (record.query @ record.key.mT * record.scale).softmax(-1).mean(1)
            named = zip(attention, rows.tokens[:, 0].bool(), strict=True)
            told.append(torch.stack([each[:, tokens].mean(1) for each, tokens in named]))
        level = torch.stack(told).mean(0).view(4, 1, *grid)
        fine = functional.interpolate(level, (16, 16), mode="bilinear")[:, 0]
        coarse += weight * _to_unit_range(fine)
    images = context.images[context.owner]
    expected = _to_unit_range(bring_up(_to_unit_range(coarse), images, upsampling, 3, 0.01))
    options = {"upsampling": upsampling, "edge_radius": 3, "edge_epsilon": 0.01}
    levels = tuple(weights.values())
    found = _word_maps(context, timestep=300, spread=False, level_weights=levels, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("combine", ["mean", "product"])
@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_masks_are_mixed_with_word_maps(scene: SceneMaker, combine: Any, threshold: float) -> None:
    context = scene()
    masks, words = _masks(4), _word_maps(context)
    step = Grounding(mixing=0.3, combine=combine, threshold=threshold)
    found = centre_threshold(step(masks, context), threshold)
    centred = centre_threshold(masks, threshold)
    expected = {
        "mean": 0.7 * centred + 0.3 * words,
        "product": torch.exp(0.7 * centred.log() + 0.3 * words.log()),
    }[combine]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@settings(max_examples=20)
@given(mixing=st.floats(0, 1), threshold=st.floats(0.05, 0.95), seed=st.integers(0, 9))
def test_where_mask_and_word_agree_the_label_stays(
    counted: StableDiffusion, mixing: float, threshold: float, seed: int
) -> None:
    numbers = torch.Generator().manual_seed(seed)
    masks, words = (torch.rand(1, 64, 64, generator=numbers) for _ in "mw")

    class Told(Grounding):
        def _word_maps(self, *_: Any) -> Tensor:
            return words

    context = RefinementContext(
        torch.zeros(1, 3, 64, 64), ("a",), ("dog",), torch.tensor([0]), generator=counted
    )
    for combine in ("mean", "product"):
        found = Told(mixing=mixing, threshold=threshold, combine=combine)(masks, context)
        assert found.min() >= 0
        assert found.max() <= 1
        both = (masks >= threshold + 1e-4) & (words >= 0.5 + 1e-4)
        neither = (masks < threshold - 1e-4) & (words < 0.5 - 1e-4)
        assert (found[both] >= threshold).all()
        assert (found[neither] < threshold).all()


def test_no_mixing_returns_the_masks_and_costs_no_pass(scene: SceneMaker) -> None:
    context, masks = scene(), _masks(4)
    assert torch.equal(Grounding(mixing=0.0)(masks, context), masks)
    assert context.generator.rows == 0


@pytest.mark.parametrize("draws", [1, 2])
def test_a_mask_and_draw_costs_one_pass_within_the_bound(scene: SceneMaker, draws: int) -> None:
    context = scene(masks_per_pass=2)
    Grounding(draws=draws)(_masks(4), context)
    assert context.generator.rows == 4 * draws
    assert context.generator.largest <= 2


def test_a_mask_does_not_depend_on_the_others(scene: SceneMaker) -> None:
    step = Grounding(mixing=0.5, upsampling="joint_bilateral")
    masks = _masks(4)
    together = refine(masks, scene(masks_per_pass=3), [step])
    for index in range(4):
        alone = refine(masks[index : index + 1], scene((index,)), [step])
        torch.testing.assert_close(together[index], alone[0], rtol=0, atol=1e-4)


def test_draws_differ_and_are_averaged(scene: SceneMaker) -> None:
    one = _word_maps(scene(), spread=False)
    other = _word_maps(scene(first_draw=1), spread=False)
    both = _word_maps(scene(), spread=False, draws=2)
    assert not torch.allclose(one, other, atol=1e-4)
    assert not torch.allclose(both, one, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mixing": 1.2},
        {"draws": 0},
        {"level_weights": ()},
        {"level_weights": (0.0, 0.0)},
        {"level_weights": (1.0, -1.0)},
        {"threshold": 1.0},
        {"edge_radius": 0},
    ],
)
def test_values_no_run_can_mean_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Grounding(**wrong)
