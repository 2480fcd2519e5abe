"""Attention for a gradient on a CPU: what the fused kernel computes twice is kept instead."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of the matrix formed at once: in float32 some megabytes, which a core's cache holds.
_ROWS = 256
# Below this many keys, as in cross-attention, the fused kernel costs next to nothing.
FEWEST_KEYS = 1024


def keeping_pays(query: Tensor, key: Tensor, *others: Tensor) -> bool:
    """Return whether ``kept_attention`` is quicker than the fused kernel, a gradient to follow.

    So it is for many tokens in bfloat16 on a CPU whose matrix products take it: the fused kernels
    run no faster there than in float32, plain products do (docs/benchmarks.md has the figures).

    Args:
        query: Q.
        key: K.
        others: what else a gradient may be taken of.
    """
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and key.shape[2] >= FEWEST_KEYS
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in (query, key, *others))
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def kept_attention(
    query: Float[Tensor, "b heads n d"],
    key: Float[Tensor, "b heads m d"],
    value: Float[Tensor, "b heads m e"],
    scale: float,
) -> Float[Tensor, "b heads n e"]:
    """Return softmax(scale · QKᵀ) V, keeping the probabilities for the gradient.

    As in the fused kernels logits and softmax are float32, and probabilities have the number
    format of the values where they meet them. Kept are ``b·heads·n·m`` numbers of that format,
    168 MB for a layer of 4096 tokens and 5 heads, until the gradient has been taken.

    Args:
        query: Q, 16 bits.
        key: K.
        value: V; may be narrower or wider than keys.
        scale: the factor before the softmax.
    """
    flat = (x.flatten(0, 1).contiguous() for x in (query, key, value))
    mixed: Tensor = _KeptAttention.apply(*flat, scale)
    return mixed.unflatten(0, query.shape[:2])


class _KeptAttention(torch.autograd.Function):
    """``kept_attention`` with batch and heads as one dimension."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        mixed = query.new_empty(*query.shape[:2], value.shape[2])
        kept = query.new_empty(*query.shape[:2], key.shape[1])
        precise, columns = query.float() * scale, key.float().mT
        logits = precise.new_empty(min(_ROWS, query.shape[1]), key.shape[1])
        for head, rows in _chunks(query):
            part = logits[: len(kept[head, rows])]
            torch.mm(precise[head, rows], columns[head], out=part)
            kept[head, rows] = torch.softmax(part, -1, out=part)
            torch.mm(kept[head, rows], value[head], out=mixed[head, rows])
        ctx.save_for_backward(query, key, value, kept)
        ctx.scale = scale
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        query, key, value, kept = ctx.saved_tensors
        above = of_outputs[0].contiguous()
        # A constant added to all values changes no gradient of the logits. Without it their
        # differences, which make that gradient, lose no digits.
        centred = (value.float() - value.float().mean(1, keepdim=True)).to(value).mT
        by_query = torch.empty_like(query)
        by_key = torch.zeros_like(key, dtype=torch.float32)
        by_value = torch.zeros_like(value, dtype=torch.float32)
        for head, rows in _chunks(query):
            chances, slope = kept[head, rows], above[head, rows]
            if ctx.needs_input_grad[2]:
                by_value[head] += chances.mT @ slope
            by_logit = slope @ centred[head]
            mean = (by_logit * chances).sum(-1, keepdim=True)
            by_logit = by_logit.sub_(mean).mul_(chances)
            torch.mm(by_logit, key[head], out=by_query[head, rows])
            by_key[head] += by_logit.mT @ query[head, rows]
        return (
            by_query * ctx.scale,
            (by_key * ctx.scale).to(key),
            by_value.to(value) if ctx.needs_input_grad[2] else None,
            None,
        )


def _chunks(query: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield every head with every chunk of its rows."""
    for head in range(query.shape[0]):
        for begin in range(0, query.shape[1], _ROWS):
            yield head, slice(begin, begin + _ROWS)
