"""Kept attention against the formula in float64, and against the fused kernel that it replaces."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from g4seg_pl.core import injection
from g4seg_pl.core.injection import injected_attention
from g4seg_pl.core.kept_attention import FEWEST_KEYS, keeping_pays, kept_attention


def inputs(seed: int = 0, queries: int = 40, keys: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers of bfloat16 in float64; values far from 0, as trained models have them."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, 5))
    query, key, value = (2 * torch.randn(shape, generator=draw) for shape in shapes)
    return tuple(x.bfloat16().double() for x in (query, key, value + 3))


def with_gradients(function: object, parts: tuple[Tensor, ...], above: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in parts]
    found = function(*leaves)
    return [found, *torch.autograd.grad(found, leaves, above.to(found))]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("queries", [40, 600])
def test_it_is_attention_with_its_gradient(queries: int) -> None:
    parts = inputs(queries=queries)
    above = torch.randn(2, 3, queries, 5, generator=torch.Generator().manual_seed(1))
    above = above.bfloat16()

    def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (0.3 * query @ key.mT).softmax(-1) @ value

    def kept(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return kept_attention(query, key, value, 0.3)

    expected = with_gradients(formula, parts, above)
    found = with_gradients(kept, tuple(x.bfloat16() for x in parts), above)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative(ours, theirs) < 1e-2


def test_values_without_gradient_get_none() -> None:
    query, key, value = (x.bfloat16() for x in inputs())
    leaf = query.requires_grad_()
    kept_attention(leaf, key, value, 0.3).sum().backward()
    assert leaf.grad is not None
    assert value.grad is None


def test_the_mask_has_the_same_gradient_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor does not compute in bfloat16")
    draw = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, 2, FEWEST_KEYS, 16, generator=draw) for _ in range(3))
    masks = torch.rand(1, 2, FEWEST_KEYS, generator=draw)
    above = torch.randn(1, 2, FEWEST_KEYS, 16, generator=draw).bfloat16()

    def of_mask(dtype: torch.dtype) -> list[Tensor]:
        parts = [x.bfloat16().to(dtype) for x in (query, key, value)]
        return with_gradients(lambda s: injected_attention(*parts, s, s, 10.0), (masks,), above)

    exact = [x.double() for x in of_mask(torch.float32)]
    kept = of_mask(torch.bfloat16)
    monkeypatch.setattr(injection, "keeping_pays", lambda *_: False)
    fused = of_mask(torch.bfloat16)
    for ours, theirs, expected in zip(kept, fused, exact, strict=True):
        assert not torch.equal(ours, theirs)
        assert relative(ours, expected) < max(2 * relative(theirs, expected), 1e-2)


def test_the_fused_kernel_stays_where_it_is_better() -> None:
    query, key, value = (torch.zeros(1, 1, FEWEST_KEYS, 8, dtype=torch.bfloat16) for _ in range(3))
    leaf = query.clone().requires_grad_()
    supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert keeping_pays(leaf, key, value) == supported
    assert keeping_pays(query, key, value.clone().requires_grad_()) == supported
    assert not keeping_pays(query, key, value)
    assert not keeping_pays(leaf.float(), key, value)
    assert not keeping_pays(leaf, key[:, :, 1:], value)
    with torch.no_grad():
        assert not keeping_pays(leaf, key, value)


def test_checkpointing_gives_the_same_gradient() -> None:
    parts = tuple(x.bfloat16() for x in inputs())
    above = torch.ones(2, 3, 40, 5, dtype=torch.bfloat16)

    def kept(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return kept_attention(functional.silu(query), key, value, 0.3)

    def again(*leaves: Tensor) -> Tensor:
        return checkpoint(kept, *leaves, use_reentrant=False)

    pairs = zip(
        with_gradients(kept, parts, above), with_gradients(again, parts, above), strict=True
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
