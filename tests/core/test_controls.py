"""Controls: each does what its name says and nothing more."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core import controls, guided
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


def _applied(matrix: Tensor, masks: Tensor, context: RefinementContext) -> Tensor:
    """Return the masks after one product with their image's matrix over an 8 x 8 grid."""
    coarse = functional.adaptive_avg_pool2d(masks, (8, 8)).flatten(1)
    moved = (matrix[context.owner] @ coarse[..., None]).view(-1, 1, 8, 8)
    return functional.interpolate(moved, (64, 64), mode="bilinear")[:, 0]


def test_colour_affinity_is_a_gaussian_of_colour_and_place(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    context = scene()
    colours = functional.adaptive_avg_pool2d((context.images + 1) / 2, (8, 8)).flatten(2).mT
    places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)) / 8
    exponent = torch.cdist(colours, colours).square() / (2 * 0.05**2)
    exponent = exponent + torch.cdist(places, places).square() / (2 * 0.2**2)
    expected = _applied((-exponent).softmax(-1), soft_masks, context)
    step = ColourAffinity(size=8, sigma_colour=0.05, sigma_position=0.2, norm="none")
    torch.testing.assert_close(step(soft_masks, context), expected, rtol=0, atol=1e-4)


def test_feature_affinity_is_a_softmax_of_cosines_over_the_temperature(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    context = scene()
    features = functional.normalize(context.features(context.images), dim=1).flatten(2)
    matrix = (features.mT @ features / 0.3).softmax(-1)
    step = FeatureAffinity(temperature=0.3, norm="none")
    expected = _applied(matrix, soft_masks, context)
    torch.testing.assert_close(step(soft_masks, context), expected, rtol=0, atol=1e-4)


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


def test_a_walk_takes_two_to_the_doublings_steps_over_scaled_edges(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    context, mask = scene((3,)), soft_masks[3:]
    image = functional.interpolate((context.images + 1) / 2, (12, 12), mode="bilinear")[0].numpy()
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    across = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    edges = 1 - np.exp(-np.sqrt((across**2 + down**2).sum(0)) / 0.7)
    coarse = functional.adaptive_avg_pool2d(mask, (12, 12))[0].numpy()
    walked = torch.from_numpy(_plain_walk(coarse, edges, 2, 4.0, 8)).float()
    expected = functional.interpolate(walked[None, None], (64, 64), mode="bilinear")[:, 0]
    step = RandomWalk(size=12, radius=2, beta=4.0, doublings=3, edge_scale=0.7, norm="none")
    torch.testing.assert_close(step(mask, context), expected, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("kind", ["guided", "joint_bilateral"])
def test_the_bound_on_memory_holds_where_masks_are_filtered(
    kind: Any, scene: SceneMaker, soft_masks: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watched(plain: Callable[..., Tensor], maps: Tensor, *rest: Any) -> Tensor:
        seen.append(len(maps))
        return plain(maps, *rest)

    for name in ("guided_filter", "guided_upsample", "joint_bilateral_upsample"):
        watcher = partial(watched, getattr(guided, name))
        monkeypatch.setattr(guided, name, watcher)
        monkeypatch.setattr(controls, name, watcher, raising=False)
    edges = {"radius": 2, "epsilon": 0.05}
    flow = Affinity(upsampling=kind, edge_radius=2, edge_epsilon=0.05)
    for step in (EdgeFilter(kind=kind, **edges), flow):
        whole = step(soft_masks, scene())
        assert max(seen) > 2
        seen.clear()
        torch.testing.assert_close(step(soft_masks, scene(masks_per_pass=2)), whole)
        assert max(seen) <= 2
        seen.clear()


def test_a_joint_bilateral_filter_weighs_distance_and_squared_contrast(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    context, radius, epsilon = scene((3,)), 2, 0.2

    def windows(maps: Tensor) -> Tensor:
        found = functional.unfold(maps, 2 * radius + 1, padding=radius)
        return found.unflatten(1, (maps.shape[1], -1))

    guide, mask = (context.images + 1) / 2, soft_masks[3:, None]
    contrast = (windows(guide) - guide.flatten(2)[:, :, None]).square().sum(1)
    offsets = torch.arange(-radius, radius + 1.0)
    distance = (offsets[:, None] ** 2 + offsets**2).flatten()[:, None]
    # Half the radius is the width in space, the root of epsilon that in colour.
    exponent = distance / (2 * (radius / 2) ** 2) + contrast / (2 * epsilon)
    weights = torch.exp(-exponent) * windows(torch.ones_like(mask))[:, 0]
    expected = (weights * windows(mask)[:, 0]).sum(1) / weights.sum(1)
    step = EdgeFilter(kind="joint_bilateral", radius=radius, epsilon=epsilon)
    found = step(soft_masks[3:], context)
    torch.testing.assert_close(found, expected.view(1, 64, 64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColourAffinity(sigma_colour=0.0), "sigma_colour is 0.0"),
        (lambda: ColourAffinity(sigma_position=-1.0), "sigma_position is -1.0"),
        (lambda: FeatureAffinity(temperature=0.0), "temperature is 0.0"),
        (lambda: RandomWalk(beta=0.0), "beta is 0.0"),
        (lambda: RandomWalk(doublings=-1), "doublings is -1"),
        (lambda: EdgeFilter(radius=0), "edge_radius is 0"),
        (lambda: EdgeFilter(mixing=1.5), "mixing is 1.5; give a value from 0 to 1"),
        (lambda: EdgeFilter(mixing=-0.1), "mixing is -0.1"),
        (lambda: OtherClass([Blur()], ["dog"]), "two different classes"),
    ],
)
def test_values_without_meaning_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
