"""Explicit mask injection: attention told which tokens belong together (Eq. 3-5)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

InjectionRule = Literal["eq5", "dense_diffusion"]

# Fused attention kernels want head sizes that are multiples of this.
_HEAD_MULTIPLE = 8


@dataclass(frozen=True)
class Injection:
    """The masks to be injected into every attention layer of one U-Net pass.

    With one class a row this is the paper's; with C classes both matrices have rank C, and one
    pass serves all of them: A_self = Σ s_c s_cᵀ, A_cross = Σ s_c k_cᵀ.

    Attributes:
        foreground: S, ``(b, c, H, W)`` in [0, 1]; may require a gradient if ``binarise_at`` is
            None. Classes beyond a row's own are all-zero maps.
        tokens: k, ``(b, c, l)``, 1 at the prompt's tokens of each class.
        weight: w of Eq. 5, at least 0; with ``dense_diffusion`` its λ, at most 1. 0 leaves the
            U-Net untouched.
        cross_attention: inject A_cross (Eq. 3).
        self_attention: inject A_self (Eq. 4).
        rule: ``eq5`` as printed, or DenseDiffusion's, in proportion to each row's own range.
        binarise_at: from where on a resized mask counts as 1; None keeps it soft.
        resize: how masks come to a layer's token grid.
        dense_strengths: w_k of the DenseDiffusion rule, for cross- and self-attention.
        classes: the names of each row's classes, in the order of its maps, for generators that
            take masks in another way than by attention.
    """

    foreground: Float[Tensor, "b c H W"]
    tokens: Float[Tensor, "b c l"]
    weight: float
    cross_attention: bool = True
    self_attention: bool = True
    rule: InjectionRule = "eq5"
    binarise_at: float | None = 0.5
    resize: Literal["nearest", "area"] = "area"
    dense_strengths: tuple[float, float] = (1.0, 0.3)
    classes: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        """Refuse a weight that the rule has no meaning for."""
        if self.weight < 0:
            message = f"injection weight is {self.weight}; give 0 (off) or more"
            raise ValueError(message)
        check_rule(self.rule, self.weight)

    @property
    def active(self) -> bool:
        """Whether any attention layer is changed at all."""
        return self.weight > 0 and (self.cross_attention or self.self_attention)

    def on_grid(self, grid: tuple[int, int]) -> Float[Tensor, "b c n"]:
        """Return the masks on a token grid of the given height and width, rows first."""
        match self.resize:
            case "area":
                resized = functional.adaptive_avg_pool2d(self.foreground, grid)
            case "nearest":
                resized = functional.interpolate(self.foreground, grid, mode="nearest-exact")
        if self.binarise_at is not None:
            resized = (resized >= self.binarise_at).to(resized.dtype)
        return resized.flatten(2)


def check_rule(rule: InjectionRule, weight: float) -> None:
    """Refuse a weight of Eq. 5 where DenseDiffusion's λ is meant.

    Raises:
        ValueError: λ is above 1: logits would move past their row's own range, the least similar
            keys to the top.
    """
    if rule == "dense_diffusion" and weight > 1:
        message = (
            f"injection_weight is {weight:g}, but with injection_rule dense_diffusion it is that "
            "rule's λ; give 0 (off) to 1"
        )
        raise ValueError(message)


def injected_attention(
    query: Float[Tensor, "b heads n d"],
    key: Float[Tensor, "b heads m d"],
    value: Float[Tensor, "b heads m d"],
    rows: Float[Tensor, "b c n"],
    columns: Float[Tensor, "b c m"],
    weight: float,
    scale: float | None = None,
) -> Float[Tensor, "b heads n d"]:
    """Return softmax((QKᵀ + w·A)/√d) V for A = Σ_c rows_c columns_cᵀ (Eq. 5), A never formed.

    A has rank c, so it enters as c more channels, √w·rows on the queries and √w·columns on the
    keys, and the fused kernels still apply. Differentiable in ``rows`` and ``columns``.

    Args:
        query: Q.
        key: K.
        value: V.
        rows: masks over the query tokens, in [0, 1].
        columns: masks over the key tokens, in [0, 1].
        weight: w, at least 0; 0 is plain attention bit for bit.
        scale: the factor before the softmax; 1/√d of the unextended d if None.
    """
    size = query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    if weight == 0:
        return functional.scaled_dot_product_attention(query, key, value, scale=scale)
    padded = -(-(size + rows.shape[1]) // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
    mixed = functional.scaled_dot_product_attention(
        _append_channels(query, rows, weight**0.5, padded),
        _append_channels(key, columns, weight**0.5, padded),
        functional.pad(value, (0, padded - size)),
        scale=scale,
    )
    return mixed[..., :size]


def dense_diffusion_attention(
    query: Float[Tensor, "b heads n d"],
    key: Float[Tensor, "b heads m d"],
    value: Float[Tensor, "b heads m d"],
    rows: Float[Tensor, "b c n"],
    columns: Float[Tensor, "b c m"],
    weight: float,
    scale: float | None = None,
) -> Float[Tensor, "b heads n d"]:
    """Return attention by DenseDiffusion's rule (Kim et al. 2023), which follows each row's range.

    With the logits L = scale·QKᵀ, R = Σ_c rows_c columns_cᵀ and a the share of the grid that a
    query's own segment covers: L + R(1-a)w(max L - L) - (1-R)(1-a)w(L - min L). The logits are
    formed in full, ``b·heads·n·m`` numbers in float32 at least.

    Args:
        query: Q.
        key: K.
        value: V.
        rows: masks over the query tokens, in [0, 1].
        columns: masks over the key tokens, in [0, 1].
        weight: w_k·λ_t, from 0, plain attention, to 1.
        scale: the factor before the softmax; 1/√d if None.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    precise = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(precise) @ key.to(precise).transpose(-1, -2) * scale
    rows, columns = rows.to(precise), columns.to(precise)
    pairs = torch.einsum("bcn,bcm->bnm", rows, columns).clamp(max=1)[:, None]
    area = (rows * rows.mean(-1, keepdim=True)).sum(1).clamp(max=1)[:, None, :, None]
    towards_most = pairs * (logits.amax(-1, keepdim=True) - logits)
    towards_least = (1 - pairs) * (logits - logits.amin(-1, keepdim=True))
    logits = logits + weight * (1 - area) * (towards_most - towards_least)
    return (logits.softmax(-1) @ value.to(precise)).to(value.dtype)


def _append_channels(tokens: Tensor, masks: Tensor, factor: float, padded: int) -> Tensor:
    batch, heads, count, size = tokens.shape
    channels = (factor * masks).to(tokens.dtype).transpose(1, 2)[:, None]
    channels = functional.pad(channels, (0, padded - size - masks.shape[1]))
    return torch.cat([tokens, channels.expand(batch, heads, count, padded - size)], dim=-1)
