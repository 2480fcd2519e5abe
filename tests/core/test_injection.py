"""Injected attention against the formulas written out, and its gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.injection import Injection, dense_diffusion_attention, injected_attention


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, matrix: Tensor, weight: float
) -> Tensor:
    """Eq. 5 with every matrix written out."""
    logits = (query @ key.transpose(-1, -2) + weight * matrix[:, None]) / math.sqrt(query.shape[-1])
    return logits.softmax(-1) @ value


def random_attention(
    seed: int, heads: int, queries: int, keys: int, size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, queries, size), (2, heads, keys, size), (2, heads, keys, size))
    query, key, value = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return query, key, value


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(1, 4),
    size=st.sampled_from([1, 4, 8, 13, 40, 64]),
    weight=st.floats(0, 50),
    soft=st.booleans(),
)
def test_cross_attention_of_any_rank_is_the_explicit_formula(
    seed: int, classes: int, size: int, weight: float, soft: bool
) -> None:
    # In float64: float32 rounds logits of 50 by several 1e-6, which its own test below allows for.
    query, key, value = random_attention(seed, 3, 30, 11, size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.rand(2, classes, count, generator=generator, dtype=torch.float64)
        for count in (30, 11)
    )
    if not soft:
        rows, columns = rows.round(), columns.round()
    matrix = sum(rows[:, c, :, None] * columns[:, c, None, :] for c in range(classes))
    expected = explicit_attention(query, key, value, matrix, weight)
    found = injected_attention(query, key, value, rows, columns, weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("classes", [1, 3])
def test_self_attention_is_the_explicit_formula(classes: int) -> None:
    query, key, value = random_attention(0, 5, 64, 64, 64)
    masks = (torch.rand(2, classes, 64) > 0.5).float()
    both = torch.zeros(2, 64, 64)
    for image in range(2):
        for mask in masks[image]:
            both[image] += torch.outer(mask, mask)
    expected = explicit_attention(query, key, value, both, 20.0)
    found = injected_attention(query, key, value, masks, masks, 20.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_weight_zero_is_plain_attention_bit_for_bit() -> None:
    query, key, value = random_attention(1, 2, 20, 20, 8)
    masks = torch.rand(2, 1, 20)
    plain = functional.scaled_dot_product_attention(query, key, value)
    assert torch.equal(injected_attention(query, key, value, masks, masks, 0.0), plain)


def test_half_precision_stays_near_the_formula() -> None:
    query, key, value = random_attention(2, 2, 50, 50, 64)
    masks = torch.rand(2, 1, 50).round()
    matrix = masks.transpose(1, 2) @ masks
    expected = explicit_attention(query, key, value, matrix, 10.0)
    parts = (x.bfloat16() for x in (query, key, value, masks, masks))
    found = injected_attention(*parts, 10.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=4e-2)


def test_gradient_agrees_with_finite_differences() -> None:
    query, key, value = random_attention(3, 2, 9, 9, 4, torch.float64)
    direction = torch.randn(2, 2, 9, 4, dtype=torch.float64)

    def loss(masks: Tensor) -> Tensor:
        return (injected_attention(query, key, value, masks, masks, 8.0) * direction).sum()

    masks = torch.rand(2, 2, 9, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(masks), masks)
    step, numeric = 1e-5, torch.zeros_like(masks)
    for place in range(masks.numel()):
        nudge = torch.zeros(masks.numel(), dtype=torch.float64)
        nudge[place] = step
        nudge = nudge.view_as(masks)
        with torch.no_grad():
            numeric.view(-1)[place] = (loss(masks + nudge) - loss(masks - nudge)) / (2 * step)
    assert (gradient - numeric).norm() / numeric.norm() < 1e-6


def test_dense_diffusion_rule_is_the_explicit_formula() -> None:
    query, key, value = random_attention(4, 2, 12, 12, 8)
    mask = torch.zeros(2, 1, 12)
    mask[0, 0, :5] = 1
    mask[1, 0, 3:] = 1
    weight, output = 0.6, torch.empty(2, 2, 12, 8)
    for image in range(2):
        segment = mask[image, 0]
        share = segment.sum() / 12
        for head in range(2):
            for i in range(12):
                row = (key[image, head] @ query[image, head, i]) / math.sqrt(8)
                pair = segment[i] * segment
                area = share * segment[i]
                up = pair * (1 - area) * weight * (row.max() - row)
                down = (1 - pair) * (1 - area) * weight * (row - row.min())
                output[image, head, i] = (row + up - down).softmax(0) @ value[image, head]
    found = dense_diffusion_attention(query, key, value, mask, mask, weight)
    torch.testing.assert_close(found, output, rtol=0, atol=1e-5)


def test_dense_diffusion_without_weight_is_plain_attention() -> None:
    query, key, value = random_attention(5, 2, 10, 7, 8)
    rows, columns = torch.rand(2, 2, 10).round(), torch.rand(2, 2, 7).round()
    plain = functional.scaled_dot_product_attention(query, key, value)
    found = dense_diffusion_attention(query, key, value, rows, columns, 0.0)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


def make_injection(foreground: Tensor, **options: object) -> Injection:
    tokens = torch.ones(foreground.shape[0], foreground.shape[1], 5)
    return Injection(foreground, tokens, 1.0, **options)


def test_masks_are_averaged_over_a_token_and_binarised_after() -> None:
    foreground = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])[None, None]
    assert make_injection(foreground).on_grid((1, 2)).tolist() == [[[0.0, 1.0]]]
    soft = make_injection(foreground, binarise_at=None)
    assert soft.on_grid((1, 2)).tolist() == [[[0.25, 0.75]]]
    low = make_injection(foreground, binarise_at=0.25)
    assert low.on_grid((1, 2)).tolist() == [[[1.0, 1.0]]]


def test_grids_are_read_row_by_row() -> None:
    foreground = torch.arange(6.0).view(1, 1, 2, 3) / 6
    injection = make_injection(foreground, binarise_at=None)
    torch.testing.assert_close(injection.on_grid((2, 3)), foreground.flatten(2))


def test_nearest_picks_single_pixels() -> None:
    foreground = torch.rand(1, 2, 8, 8)
    found = make_injection(foreground, binarise_at=None, resize="nearest").on_grid((4, 4))
    assert torch.isin(found, foreground).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), weight=st.floats(0, 1))
def test_dense_diffusion_keeps_the_order_of_keys_inside_and_of_those_outside(
    seed: int, weight: float
) -> None:
    query, key, _ = random_attention(seed, 2, 6, 9, 9)  # values say which key was attended to
    numbers = torch.Generator().manual_seed(seed)
    rows = torch.rand(2, 1, 6, generator=numbers).round()
    columns = torch.rand(2, 1, 9, generator=numbers).round()
    every = torch.eye(9).expand(2, 2, 9, 9)
    found = dense_diffusion_attention(query, key, every, rows, columns, weight)
    plain = functional.scaled_dot_product_attention(query, key, every)
    pairs = (rows.transpose(1, 2) * columns)[:, None].expand_as(plain)
    for own in (pairs == 1, pairs == 0):
        before = plain.masked_fill(~own, -1)
        favourite = before.argmax(-1, keepdim=True)
        most = found.masked_fill(~own, -1).amax(-1, keepdim=True)
        torch.testing.assert_close(
            found.masked_fill(~own, -1).gather(-1, favourite), most, rtol=1e-5, atol=1e-6
        )


def test_a_weight_of_the_other_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="rule's λ; give 0"):
        Injection(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 5), 10.0, rule="dense_diffusion")


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"injection weight is -1.0; give 0 \(off\) or more"):
        Injection(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 5), -1.0)


@pytest.mark.parametrize(
    ("weight", "cross", "own", "active"),
    [(1.0, True, True, True), (0.0, True, True, False), (1.0, False, False, False)],
)
def test_active_means_that_a_layer_changes(
    weight: float, cross: bool, own: bool, active: bool
) -> None:
    masks, tokens = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 5)
    injection = Injection(masks, tokens, weight, cross_attention=cross, self_attention=own)
    assert injection.active is active
