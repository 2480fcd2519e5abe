"""Controls: each does what its name says and nothing more."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.controls import (
    ColourAffinity,
    EdgeFilter,
    FeatureAffinity,
    FlatInjection,
    OtherClass,
    OtherLatent,
    RandomWalk,
)
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.random_walk import random_walk
from g4seg_pl.core.refine import RefinementState, refine
from g4seg_pl.core.steps import Blur

SceneMaker = Callable[..., RefinementContext]

STEPS = [
    ColourAffinity(),
    ColourAffinity(size=12, sigma_position=None, form="heads", norm="area"),
    FeatureAffinity(power=2.0, normalisation="sinkhorn"),
    RandomWalk(doublings=2),
    RandomWalk(size=12, spare_edges=True, norm="none", mixing=0.5, doublings=1),
    EdgeFilter(),
    EdgeFilter(kind="joint_bilateral", radius=2, epsilon=0.05),
    FlatInjection([Gradient(iterations=1)]),
    OtherLatent([Affinity()], permute="upside_down"),
    OtherClass([Gradient(iterations=1)], ["dog", "cat", "bus"]),
]


@pytest.mark.parametrize("step", STEPS)
def test_every_control_stays_in_range_and_with_its_image(
    step: Any, scene: SceneMaker, soft_masks: Tensor
) -> None:
    together = refine(soft_masks, scene(), [step])
    assert together.shape == soft_masks.shape
    assert together.min() >= 0
    assert together.max() <= 1
    assert not torch.equal(together, soft_masks)
    order = [3, 2, 0, 1]
    reordered = refine(soft_masks[order], scene(tuple(order), masks_per_pass=1), [step])
    torch.testing.assert_close(reordered, together[order], rtol=0, atol=1e-3)


@pytest.mark.parametrize("step", STEPS[:7])
def test_controls_without_a_model_use_none(
    step: Any, scene: SceneMaker, soft_masks: Tensor
) -> None:
    context = scene()
    step(soft_masks, context)
    assert context.generator.rows == 0


def test_colour_affinity_joins_equal_colours(scene: SceneMaker) -> None:
    context = scene((3,))
    context.images = torch.zeros(1, 3, 64, 64)
    context.images[:, :, :, 32:] = 1.0
    seed = torch.zeros(1, 64, 64)
    seed[:, 8:56, 8:24] = 1.0
    step = ColourAffinity(sigma_colour=0.05, sigma_position=None, power=1.0)
    found = step(seed, context)
    assert found[:, :, :30].min() > 0.99
    assert found[:, :, 34:].max() < 0.01


def _plain_walk(
    mask: np.ndarray, edges: np.ndarray, radius: int, beta: float, steps: int
) -> np.ndarray:
    height, width = mask.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    walk = np.zeros((len(places), len(places)))
    for i, (row, column) in enumerate(places):
        for j, (other_row, other_column) in enumerate(places):
            down, right = other_row - row, other_column - column
            if np.hypot(down, right) > radius:
                continue
            count = max(abs(down), abs(right))
            line = (
                [
                    (row + round(down * k / count), column + round(right * k / count))
                    for k in range(count + 1)
                ]
                if count
                else []
            )
            strongest = max((edges[place] for place in line), default=0.0)
            walk[i, j] = (1 - strongest) ** beta
    walk /= walk.sum(1, keepdims=True)
    return (np.linalg.matrix_power(walk, steps) @ mask.reshape(-1)).reshape(height, width)


@pytest.mark.parametrize("radius", [1, 3])
def test_random_walk_is_a_power_of_its_matrix(radius: int) -> None:
    numbers = torch.Generator().manual_seed(0)
    masks, edges = (torch.rand(2, 7, 6, generator=numbers, dtype=torch.float64) for _ in "me")
    found = random_walk(masks, edges, radius, 4.0, 5)
    for index in range(2):
        expected = _plain_walk(masks[index].numpy(), edges[index].numpy(), radius, 4.0, 5)
        np.testing.assert_allclose(found[index].numpy(), expected, atol=1e-12)


def test_a_walk_does_not_cross_an_edge() -> None:
    masks, edges = torch.zeros(1, 9, 9), torch.zeros(1, 9, 9)
    masks[:, :, :2] = 1.0
    edges[:, :, 4] = 1.0
    found = random_walk(masks, edges, 2, 10.0, 64)
    assert found[:, :, :4].min() > 0.4
    assert found[:, :, 5:].max() == 0


def test_flat_injection_adds_what_a_flat_mask_becomes(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    step = Gradient(iterations=1)
    flat = torch.full_like(soft_masks, 0.5)
    expected = (soft_masks + step(flat, scene()) - 0.5).clamp(0, 1)
    torch.testing.assert_close(FlatInjection([step])(soft_masks, scene()), expected)
    assert FlatInjection([step]).needs_gradient
    assert not FlatInjection([Blur()]).needs_gradient


def test_other_latent_is_the_next_images(scene: SceneMaker, soft_masks: Tensor) -> None:
    context = scene()
    found = OtherLatent([Affinity()])(soft_masks, context)
    swapped = scene()
    swapped.__dict__["latents"] = scene().latents[[1, 0]]
    assert torch.equal(found, Affinity()(soft_masks, swapped))
    assert torch.equal(context.latents, scene().latents)
    alone = OtherLatent([Affinity()])(soft_masks[3:], scene((3,)))
    turned = OtherLatent([Affinity()], permute="upside_down")(soft_masks[3:], scene((3,)))
    assert torch.equal(alone, turned)


def test_other_class_is_told_to_the_model(scene: SceneMaker, soft_masks: Tensor) -> None:
    context = scene()
    step = Gradient(iterations=1)
    names = ["dog", "cat", "zebra disc"]
    found = OtherClass([step], names)(soft_masks, context)
    renamed = scene()
    renamed.class_names = ("cat", "zebra disc", "dog", "dog")
    torch.testing.assert_close(found, step(soft_masks, renamed))
    assert context.class_names[0] == "dog"


def test_what_a_wrapped_step_records_reaches_the_callback(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    seen: list[RefinementState] = []
    step = OtherClass([Gradient(iterations=1)], ["dog", "cat"])
    refine(soft_masks, scene(), [step], seen.append)
    assert seen[0].artifacts["gradient"].shape == (4, 16, 16)


def test_an_edge_filter_keeps_a_mask_that_follows_the_edges(scene: SceneMaker) -> None:
    truth = functional.pad(torch.ones(1, 32, 32), (16, 16, 16, 16))
    context = scene((3,))
    context.images = (truth * 2 - 1)[:, None].expand(-1, 3, -1, -1)
    for kind in ("guided", "joint_bilateral"):
        found = EdgeFilter(kind=kind, radius=4)(truth, context)
        torch.testing.assert_close(found, truth, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColourAffinity(sigma_colour=0.0), "sigma_colour is 0.0"),
        (lambda: ColourAffinity(sigma_position=-1.0), "sigma_position is -1.0"),
        (lambda: FeatureAffinity(temperature=0.0), "temperature is 0.0"),
        (lambda: RandomWalk(beta=0.0), "beta is 0.0"),
        (lambda: RandomWalk(doublings=-1), "doublings is -1"),
        (lambda: EdgeFilter(radius=0), "edge_radius is 0"),
        (lambda: OtherClass([Blur()], ["dog"]), "two different classes"),
    ],
)
def test_values_without_meaning_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
