"""Ways to compute one attention layer of many tokens, of which the quicker ones are in use."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.bench.rows import Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.timing import describe_pairs, interleaved, ratio
from g4seg_pl.core.kept_attention import kept_attention

CHUNK = 256
MASKS = 3


def attention(setting: Setting) -> Iterator[Row]:
    """Yield time ratios for the finest self-attention: 4096 tokens at full size, 5 heads of 64.

    ``kept`` is what a gradient in bfloat16 goes through on a CPU; ``explicit`` would be another
    way to move a few masks along attention, rows of the matrix formed in chunks.

    Args:
        setting: size, device and rounds.
    """
    heads, tokens = (5, 4096) if setting.size.full else (2, 1024)
    draw = torch.Generator().manual_seed(0)
    drawn = (torch.randn(1, heads, tokens, 64, generator=draw) for _ in range(3))
    half = [x.to(setting.device, torch.bfloat16) for x in drawn]
    precise = [x.float() for x in half]
    # As injection extends queries and keys: by one channel, and by zeros for the fused kernel.
    longer = [functional.pad(x, (0, 1)) for x in half[:2]] + half[2:]
    padded = [functional.pad(x, (0, 8)) for x in half]
    masks = precise[2][..., :MASKS].contiguous()
    kept = partial(kept_attention, scale=0.125)
    runs: dict[str, Callable[[], object]] = {
        "fused, bfloat16": partial(_fused, *half),
        "fused, float32": partial(_fused, *precise),
        "explicit, 3 masks": partial(_explicit, *precise[:2], masks),
        "explicit, 3 masks, bfloat16 logits": partial(_explicit, *half[:2], masks),
        "kept, with gradient": partial(_with_gradient, kept, longer),
        "fused, with gradient": partial(_with_gradient, _fused, padded),
    }
    spent = interleaved(runs, setting.rounds, setting.device)
    for over, under in (
        ("fused, bfloat16", "fused, float32"),
        ("explicit, 3 masks", "fused, float32"),
        ("explicit, 3 masks, bfloat16 logits", "fused, float32"),
        ("kept, with gradient", "fused, with gradient"),
    ):
        detail = f"{tokens} tokens, {heads} heads; {describe_pairs(spent[over], spent[under])}"
        value = ratio(spent[over], spent[under])
        yield Row(f"attention: {over} / {under}", value, "×", None, detail)


def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, scale=0.125)


def _explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    found = [(0.125 * rows @ key.mT).float().softmax(-1) @ value for rows in query.split(CHUNK, 2)]
    return torch.cat(found, dim=2)


def _with_gradient(function: Callable[..., Tensor], parts: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in parts]
    with torch.enable_grad():
        found = function(*leaves)
    return torch.autograd.grad(found, leaves, torch.ones_like(found))
