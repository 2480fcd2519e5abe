"""Grounding: masks move towards where the generator attends to the class's name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.generation import Rows, in_parts, noised, rows_per_class
from g4seg_pl.core.guided import Upsampling, bring_up, check_edges
from g4seg_pl.core.propagation import fused_product
from g4seg_pl.core.protocols import AttentionRecord
from g4seg_pl.core.resize import min_max, resize_maps
from g4seg_pl.core.threshold import centre_threshold, check_threshold, restore_threshold
from g4seg_pl.types import ConfigurationError

# DiffSegmenter's weights of cross-attention's token grids, from the coarsest (8, 16, 32, 64).
LEVEL_WEIGHTS = (0.3, 0.5, 0.1, 0.1)
# Only keeps flat maps from becoming NaN.
_GUARD = 1e-12


@dataclass(frozen=True)
class Grounding:
    """Masks are mixed with the cross-attention of one U-Net pass to the class's name.

    The word map G of a mask is DiffSegmenter's (TIP 2025): cross-attention to the name's tokens,
    each token grid by its minimum and maximum, summed by weights, spread once by the finest
    self-attention of the same pass, and brought to [0, 1] by its minimum and maximum. It needs
    the noised image and the word alone, so it can point where the coarse mask has nothing.

    Attributes:
        mixing: λ, the weight of G against S; 0 returns the masks, 1 replaces them.
        combine: ``mean``: (1-λ)S + λG; ``product``: the geometric mean S^(1-λ) · G^λ, which both
            must support.
        timestep: t, at which the image is noised.
        draws: draws of noise, each a pass; their maps are averaged.
        level_weights: of cross-attention's token grids, the coarsest first; those of grids that
            the U-Net lacks are left out.
        spread: spread the map by self-attention.
        threshold: from where on S counts as foreground; it sits at 0.5 while S and G are mixed
            and after that at its own place again.
        upsampling: of G: bilinear, or along the image's edges.
        edge_radius: window of the latter, in cells of the finest token grid.
        edge_epsilon: squared contrast below which an edge is smoothed over.
    """

    mixing: float = 0.5
    combine: Literal["mean", "product"] = "mean"
    timestep: int = 100
    draws: int = 1
    level_weights: tuple[float, ...] = LEVEL_WEIGHTS
    spread: bool = True
    threshold: float = 0.5
    upsampling: Upsampling = "bilinear"
    edge_radius: int = 2
    edge_epsilon: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if not 0 <= self.mixing <= 1:
            message = f"mixing is {self.mixing}; give a value from 0 to 1"
            raise ValueError(message)
        if self.draws < 1:
            message = f"draws is {self.draws}; give 1 or more"
            raise ValueError(message)
        if min(self.level_weights, default=-1.0) < 0 or not any(self.level_weights):
            message = f"level_weights is {self.level_weights}; give none below 0, and one above it"
            raise ValueError(message)
        check_threshold(self.threshold)
        check_edges(self.edge_radius, self.edge_epsilon)

    @torch.no_grad()
    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return the masks mixed with their word maps."""
        if self.mixing == 0:
            return foreground
        rows = rows_per_class(foreground, context, own_noise=False)
        maps = torch.cat([self._word_maps(part, context) for part in in_parts(rows, context)])
        context.record("word_maps", maps)
        centred = centre_threshold(foreground, self.threshold)
        match self.combine:
            case "mean":
                mixed = (1 - self.mixing) * centred + self.mixing * maps.to(centred)
            case "product":
                mixed = centred ** (1 - self.mixing) * maps.to(centred) ** self.mixing
        return restore_threshold(mixed.clamp(0, 1), self.threshold)

    def _word_maps(self, rows: Rows, context: RefinementContext) -> Float[Tensor, "r H W"]:
        """Return G of rows of one class each, at working size."""
        total: Tensor | float = 0.0
        for draw in range(self.draws):
            noisy, _ = noised(rows, context, self.timestep, draw)
            embeddings = context.embed(rows.prompts)
            own, cross = context.generator.attention(noisy, self.timestep, embeddings)
            found = cross_attention_map(cross, rows.tokens[:, 0] > 0, self.level_weights)
            total = total + (spread_by_self_attention(own, found) if self.spread else found)
        coarse = min_max(torch.as_tensor(total) / self.draws, _GUARD)
        images = context.images[list(rows.owner)]
        fine = bring_up(coarse, images, self.upsampling, self.edge_radius, self.edge_epsilon)
        return min_max(fine, _GUARD)


def cross_attention_map(
    records: Sequence[AttentionRecord],
    tokens: Bool[Tensor, "b l"],
    weights: Sequence[float] = LEVEL_WEIGHTS,
) -> Float[Tensor, "b h w"]:
    """Return the weighted sum of the attention to the marked tokens over all resolutions.

    Args:
        records: of cross-attention layers.
        tokens: marks the class name's tokens in each prompt.
        weights: of the resolutions from the coarsest; those of levels that are not there are
            left out.

    Returns:
        a map at the finest resolution.

    Raises:
        ConfigurationError: there are more resolutions than weights.
    """
    grids = sorted({record.grid for record in records})
    if len(grids) > len(weights):
        message = f"level_weights has {len(weights)} values; the U-Net has {len(grids)} levels"
        raise ConfigurationError(message)
    total: Tensor | float = 0.0
    for grid, weight in zip(grids, weights, strict=False):
        layers = [_to_tokens(record, tokens) for record in records if record.grid == grid]
        level = torch.cat(layers, dim=1).mean(1).unflatten(1, grid)
        total = total + weight * min_max(resize_maps(level, grids[-1]), _GUARD)
    return torch.as_tensor(total)


def spread_by_self_attention(
    records: Sequence[AttentionRecord], maps: Float[Tensor, "b h w"]
) -> Float[Tensor, "b h w"]:
    """Return A·map with A the finest self-attention averaged over heads and layers.

    Args:
        records: of self-attention layers of the same pass; coarser ones do not count.
        maps: at the finest resolution.
    """
    grid = max(record.grid for record in records)
    values = resize_maps(maps, grid).flatten(1)[:, None]
    moved = [fused_product(values, record) for record in records if record.grid == grid]
    return torch.cat(moved, dim=1).mean(1).reshape(-1, *grid)


def _to_tokens(record: AttentionRecord, tokens: Tensor) -> Float[Tensor, "b heads n"]:
    """Mean attention probability of the marked tokens, in float32."""
    logits = record.query.float() @ record.key.float().transpose(2, 3) * record.scale
    # An embedding may carry more than its tokens at the end (SDXL's pooled row): those are no keys.
    marked = tokens[:, : record.key.shape[2]].to(logits)[:, None, :, None]
    probability: Tensor = logits.softmax(-1) @ marked
    return probability[..., 0] / marked.sum(2)
