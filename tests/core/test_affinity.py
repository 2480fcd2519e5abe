"""Affinity against explicit matrices, its cost, and what it must leave alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core import propagation
from g4seg_pl.core.affinity import Affinity, rescale
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.guided import bring_up
from g4seg_pl.core.propagation import AffinityMatrix, gaussian_record, more_heads
from g4seg_pl.core.protocols import AttentionRecord
from g4seg_pl.core.refine import refine
from g4seg_pl.core.threshold import centre_threshold, restore_threshold

SceneMaker = Callable[..., RefinementContext]


def _record(seed: int = 0, heads: int = 2, side: int = 6, size: int = 5) -> AttentionRecord:
    numbers = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, heads, side * side, size, generator=numbers) for _ in "qk")
    return AttentionRecord(f"layer{seed}", query, key, size**-0.5, (side, side))


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponent = np.exp(logits - logits.max(-1, keepdims=True))
    return exponent / exponent.sum(-1, keepdims=True)


def _logits(record: AttentionRecord) -> np.ndarray:
    query, key = record.query.double().numpy(), record.key.double().numpy()
    return record.scale * query @ key.transpose(0, 1, 3, 2)


def _sinkhorn(matrix: np.ndarray, rounds: int) -> np.ndarray:
    """Rows last, columns before; written on the matrix itself."""
    matrix = matrix / matrix.sum(-1, keepdims=True)
    for _ in range(rounds):
        matrix = matrix / matrix.sum(-2, keepdims=True)
        matrix = matrix / matrix.sum(-1, keepdims=True)
    return matrix


def _explicit(
    records: list[AttentionRecord], weights: list[float], form: str, power: float, rounds: int
) -> np.ndarray:
    total = sum(weights)
    if form == "heads":
        parts = [_sinkhorn(_softmax(power * _logits(r)), rounds).mean(1) for r in records]
        return sum(w / total * p for w, p in zip(weights, parts, strict=True))
    parts = [_softmax(_logits(r)).mean(1) for r in records]
    mean = sum(w / total * p for w, p in zip(weights, parts, strict=True))
    return _sinkhorn(mean**power, rounds)


@pytest.mark.parametrize("form", ["heads", "average"])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("classes", [1, 3, 19])
def test_propagation_is_the_product_with_the_explicit_matrix(
    form: Any, power: float, rounds: int, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(propagation, "_BUDGET", 1000)
    records, weights = [_record(0), _record(1, heads=3, size=8)], [1.0, 0.5]
    values = torch.rand(2, classes, 36, generator=torch.Generator().manual_seed(2))
    matrix = AffinityMatrix(tuple(records), tuple(weights), form, power, rounds)
    for products in (1, 2):
        expected = values.double().numpy().transpose(0, 2, 1)
        for _ in range(products):
            expected = _explicit(records, weights, form, power, rounds) @ expected
        expected = torch.from_numpy(expected.transpose(0, 2, 1))
        found = matrix.propagate(values, products)
        assert (found - expected).norm() / expected.norm() <= 1e-6
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["heads", "average"])
def test_sinkhorn_makes_columns_weigh_alike(form: Any) -> None:
    matrix = AffinityMatrix((_record(),), (1.0,), form, 2.0, 50)
    whole = matrix.propagate(torch.eye(36).expand(2, -1, -1))  # row c: what column c gives
    ones = torch.ones(2, 36)
    torch.testing.assert_close(whole.sum(1), ones, rtol=0, atol=1e-5)
    if form == "average":
        torch.testing.assert_close(whole.sum(2), ones, rtol=0, atol=1e-3)


def test_masks_stay_precise_with_a_model_in_16_bits() -> None:
    record = _record()
    half = AttentionRecord(
        "half", record.query.bfloat16(), record.key.bfloat16(), record.scale, record.grid
    )
    whole = AttentionRecord(
        "whole", half.query.float(), half.key.float(), record.scale, record.grid
    )
    values = torch.rand(2, 2, 36)
    for form in ("heads", "average"):
        found = AffinityMatrix((half,), (1.0,), form, 2.0).propagate(values)
        assert torch.equal(found, AffinityMatrix((whole,), (1.0,), form, 2.0).propagate(values))


def test_draws_are_more_heads() -> None:
    first, second = _record(0), _record(1)
    values = torch.rand(2, 2, 36)
    for form, power in (("heads", 2.0), ("average", 1.0)):
        parts = [
            AffinityMatrix((r,), (1.0,), form, power).propagate(values) for r in (first, second)
        ]
        both = AffinityMatrix((more_heads([first, second]),), (1.0,), form, power)
        torch.testing.assert_close(both.propagate(values), (parts[0] + parts[1]) / 2)


def test_a_steps_draws_are_different_ones_and_averaged(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    context = scene()
    one, two = (Affinity(form="heads", norm="none", draws=draws) for draws in (1, 2))
    first = one(soft_masks, context)
    second = one(soft_masks, context.variant(first_draw=1))
    assert (first - second).abs().max() > 1e-3
    found = two(soft_masks, context)
    torch.testing.assert_close(found, (first + second) / 2, rtol=0, atol=1e-5)


def test_a_gaussian_of_distances_is_an_attention() -> None:
    points = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 4 + 100
    flat = points.flatten(2).mT
    kernel = torch.exp(-torch.cdist(flat.double(), flat.double()).square() / (2 * 0.7**2))
    values = torch.rand(2, 2, 20)
    expected = (kernel / kernel.sum(-1, keepdim=True) @ values.double().mT).mT
    for form in ("heads", "average"):
        matrix = AffinityMatrix((gaussian_record(points, 0.7),), (1.0,), form)
        found = matrix.propagate(values).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def _identity(side: int, images: int) -> AttentionRecord:
    tokens = 100 * torch.eye(side * side).expand(images, 1, -1, -1)
    return AttentionRecord("identity", tokens, tokens, 1.0, (side, side))


@pytest.mark.parametrize("form", ["heads", "average"])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_identity_affinity_returns_the_seed(
    form: Any,
    threshold: float,
    scene: SceneMaker,
    soft_masks: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = scene()

    def identity(noisy: Tensor, *_: Any) -> list[AttentionRecord]:
        return [_identity(8, len(noisy))]

    monkeypatch.setattr(context.generator, "self_attention", identity)
    options = {"form": form, "threshold": threshold, "norm": "none"}
    fine = Affinity(**options, carry="difference")(soft_masks, context)
    torch.testing.assert_close(fine, soft_masks, rtol=0, atol=1e-6)
    # Without the seed's fine edges it is the seed as the grid holds it.
    coarse = functional.adaptive_avg_pool2d(soft_masks, (8, 8))[:, None]
    expected = functional.interpolate(coarse, (64, 64), mode="bilinear")[:, 0]
    if threshold == 0.5:
        found = Affinity(**options)(soft_masks, context)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    constant = torch.full_like(soft_masks, 0.4)
    found = Affinity(**options)(constant, context)
    torch.testing.assert_close(found, constant, rtol=0, atol=1e-6)


def _as_attention(
    records: list[AttentionRecord], context: RefinementContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the generator's self-attention be known."""
    monkeypatch.setattr(context.generator, "self_attention", lambda *_: records)


def _moved(masks: Tensor, context: RefinementContext, matrix: np.ndarray, times: int) -> Tensor:
    """Return the masks after times products with their image's explicit matrix, on its grid."""
    side = round(matrix.shape[-1] ** 0.5)
    coarse = functional.adaptive_avg_pool2d(masks, (side, side)).flatten(1)
    power = torch.from_numpy(np.linalg.matrix_power(matrix, times)).float()[context.owner]
    return (power @ coarse[..., None])[..., 0]


def _brought_up(
    flat: Tensor, context: RefinementContext, how: Any = "bilinear", *edges: float
) -> Tensor:
    side = round(flat.shape[1] ** 0.5)
    radius, epsilon = edges or (1, 1.0)
    images = context.images[context.owner]
    return bring_up(flat.view(-1, side, side), images, how, int(radius), epsilon)


@pytest.mark.parametrize("form", ["heads", "average"])
@pytest.mark.parametrize(("normalisation", "rounds"), [("row", 0), ("sinkhorn", 3)])
def test_a_step_multiplies_by_the_matrix_its_fields_describe(
    form: Any,
    normalisation: Any,
    rounds: int,
    scene: SceneMaker,
    soft_masks: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context, records = scene(), [_record(0, side=8), _record(1, side=8)]
    _as_attention(records, context, monkeypatch)
    step = Affinity(
        form=form,
        power=3.0,
        products=2,
        normalisation=normalisation,
        sinkhorn_iterations=3,
        norm="none",
        layer_weights={"layer0": 2.0, "layer1": 1.0},
    )
    matrix = _explicit(records, [2.0, 1.0], form, 3.0, rounds)
    expected = _brought_up(_moved(soft_masks, context, matrix, 2), context)
    torch.testing.assert_close(step(soft_masks, context), expected, rtol=0, atol=1e-5)


def test_levels_count_by_their_weights_the_finest_first(
    scene: SceneMaker, soft_masks: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, records = scene(), [_record(0, side=4), _record(1, side=8)]
    _as_attention(records, context, monkeypatch)
    step = Affinity(level_weights=(3.0, 1.0), power=1.0, norm="none")
    coarse, fine = (
        _brought_up(_moved(soft_masks, context, _explicit([r], [1.0], "heads", 1.0, 0), 1), context)
        for r in records
    )
    expected = 0.75 * fine + 0.25 * coarse
    torch.testing.assert_close(step(soft_masks, context), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["max", "range"])
@pytest.mark.parametrize("upsampling", ["bilinear", "guided", "joint_bilateral"])
def test_a_mask_gets_its_range_back_and_comes_up_as_asked(
    norm: Any,
    upsampling: Any,
    scene: SceneMaker,
    soft_masks: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context, records = scene(), [_record(side=8)]
    _as_attention(records, context, monkeypatch)
    options = {"upsampling": upsampling, "edge_radius": 3, "edge_epsilon": 0.01}
    found = Affinity(power=1.0, norm=norm, peak=0.8, **options)(soft_masks, context)
    moved = _moved(soft_masks, context, _explicit(records, [1.0], "heads", 1.0, 0), 1)
    top = moved.quantile(0.8, dim=1, keepdim=True, interpolation="nearest")
    low = moved.amin(1, keepdim=True) if norm == "range" else 0.0
    scaled = ((moved - low) / (top - low)).clamp(0, 1)
    expected = _brought_up(scaled, context, upsampling, 3, 0.01).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("empty", ("", "")),
        ("classes", ("A photo of dog and cat and zebra disc", "A photo of potted plant")),
    ],
)
def test_the_unet_is_told_nothing_or_the_images_classes(
    prompt: Any,
    told: tuple[str, ...],
    scene: SceneMaker,
    soft_masks: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context, seen = scene(), []

    def self_attention(noisy: Tensor, timestep: int, embeddings: Tensor) -> list[AttentionRecord]:
        seen.append(embeddings)
        return [_identity(8, len(noisy))]

    monkeypatch.setattr(context.generator, "self_attention", self_attention)
    Affinity(prompt=prompt)(soft_masks, context)
    assert torch.equal(seen[0], context.embed(told))


def test_mixing_zero_returns_the_seed(scene: SceneMaker, soft_masks: Tensor) -> None:
    found = Affinity(mixing=0.0)(soft_masks, scene())
    assert torch.equal(found, soft_masks)


STEPS = [
    Affinity(),
    Affinity(form="heads", power=4.0, draws=2, mixing=0.5),
    Affinity(prompt="classes", level_weights=(1.0, 0.5), norm="area", threshold=0.3),
    Affinity(normalisation="sinkhorn", carry="difference", products=2),
    Affinity(upsampling="guided", norm="none", layer_weights={"up_blocks": 1.0}),
    Affinity(upsampling="joint_bilateral", peak=0.98),
]


@pytest.mark.parametrize("step", STEPS)
def test_a_mask_depends_on_its_own_image_alone(
    step: Any, scene: SceneMaker, soft_masks: Tensor
) -> None:
    together = refine(soft_masks, scene(), [step])
    assert together.shape == soft_masks.shape
    assert together.min() >= 0
    assert together.max() <= 1
    assert not torch.equal(together, soft_masks)
    in_small_parts = refine(soft_masks, scene(masks_per_pass=1), [step])
    torch.testing.assert_close(in_small_parts, together, rtol=0, atol=1e-4)
    alone = refine(soft_masks[3:], scene((3,)), [step])
    torch.testing.assert_close(alone, together[3:], rtol=0, atol=1e-4)
    order = [3, 2, 0, 1] if step.prompt == "empty" else [3, 0, 1, 2]
    reordered = refine(soft_masks[order], scene(tuple(order)), [step])
    torch.testing.assert_close(reordered, together[order], rtol=0, atol=1e-4)


@pytest.mark.parametrize("draws", [1, 3])
def test_the_number_of_classes_costs_nothing(
    draws: int, scene: SceneMaker, soft_masks: Tensor
) -> None:
    step = Affinity(draws=draws)
    for masks in ((0,), (0, 1, 2)):
        context = scene(masks)
        before = context.generator.rows
        step(soft_masks[list(masks)], context)
        assert context.generator.rows - before == draws
    context = scene(masks_per_pass=1)
    step(soft_masks, context)
    assert context.generator.largest <= 1 or draws == 1


def test_an_empty_prompt_needs_no_class_in_the_tokenizers_window(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    context = scene()
    context.class_names = ("brick " * 60,) * 4
    Affinity()(soft_masks, context)


def test_layers_are_chosen_by_level_and_name(scene: SceneMaker, soft_masks: Tensor) -> None:
    context = scene()
    (fine, matrix), (coarse, other) = Affinity(level_weights=(1.0, 0.5)).matrices(
        [0], [""], context
    )
    assert (fine, matrix.grid) == (1.0, (16, 16))
    assert (coarse, other.grid) == (0.5, (8, 8))
    weights = {"up_blocks": 2.0, "down_blocks": 0.0}
    ((_, upper),) = Affinity(layer_weights=weights).matrices([0], [""], context)
    assert all("up_blocks" in record.layer for record in upper.records)
    assert set(upper.weights) == {2.0}
    with pytest.raises(ValueError, match="leave none of the layers"):
        Affinity(layer_weights={"nowhere": 1.0})(soft_masks, context)


@settings(max_examples=50)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6),
    st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6),
    st.sampled_from(["max", "range", "area", "none"]),
    st.floats(0.5, 1),
)
def test_rescaled_masks_lie_in_range(
    moved: list[float], before: list[float], norm: Any, peak: float
) -> None:
    found = rescale(torch.tensor(moved)[None, None], torch.tensor(before)[None, None], norm, peak)
    assert found.min() >= 0
    assert found.max() <= 1


@settings(max_examples=50)
@given(st.integers(0, 20), st.integers(0, 1000))
def test_the_area_above_the_threshold_is_kept(kept: int, seed: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    moved = torch.rand(1, 1, 20, generator=numbers)
    before = torch.full((1, 1, 20), 0.1)
    before[..., :kept] = 0.9
    found = rescale(moved, before, "area")
    assert int((found >= 0.5).sum()) == kept
    order = moved.flatten().argsort()
    assert (found.flatten()[order].diff() >= -1e-6).all()


def test_an_empty_mask_stays_empty() -> None:
    zero = torch.zeros(1, 1, 9)
    for norm in ("max", "range", "area", "none"):
        assert not rescale(zero, zero, norm).any()


@pytest.mark.parametrize("level", [1.0, 0.3])
def test_a_flat_mask_stays_what_it_is(level: float) -> None:
    flat = torch.full((1, 1, 100), level)
    rounded = flat + 1e-7 * torch.randn(1, 1, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rescale(rounded, flat, "range"), flat)


@given(st.floats(0.05, 0.95), st.floats(0, 1))
def test_a_threshold_comes_back_to_its_place(threshold: float, value: float) -> None:
    mask = torch.tensor([value, 0.0, 1.0, threshold], dtype=torch.float64)
    centred = centre_threshold(mask, threshold)
    torch.testing.assert_close(restore_threshold(centred, threshold), mask)
    torch.testing.assert_close(centred[1:], torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))
    assert (centred[0] >= 0.5 - 1e-12) == (value >= threshold - 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing": 1.5}, "mixing is 1.5"),
        ({"power": 0.0}, "power is 0.0"),
        ({"products": 0}, "products is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"level_weights": (0.0,)}, "level_weights is"),
        ({"edge_radius": 0}, "edge_radius is 0"),
        ({"edge_epsilon": 0.0}, "edge_epsilon is 0.0"),
    ],
)
def test_values_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Affinity(**options)
