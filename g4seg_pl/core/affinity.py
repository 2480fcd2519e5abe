"""Affinity: masks flow along the generator's own self-attention, S ← S + λ(norm(A·S) - S)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.diffusion import add_noise
from g4seg_pl.core.generation import Groups, groups_per_image
from g4seg_pl.core.guided import Upsampling, bring_up, check_edges
from g4seg_pl.core.propagation import AffinityMatrix, more_heads
from g4seg_pl.core.protocols import AttentionRecord
from g4seg_pl.core.threshold import centre_threshold, check_threshold, restore_threshold

Norm = Literal["max", "range", "area", "none"]

# Below this share of its maximum a map's range is rounding.
_FLAT = 1e-5


@dataclass(frozen=True)
class Propagation(ABC):
    """What every step that moves masks along some affinity A has in common.

    Attributes:
        mixing: λ; 0 returns the masks, 1 replaces them.
        power: p, the sharpening of A; positive.
        form: ``average``: A averaged over heads and layers, then to the power p, rows normalised;
            ``heads``: each head's logits times p before its softmax, averaged after, in the
            fused kernels.
        products: how often A is applied.
        normalisation: A's rows sum to 1, or by Sinkhorn its rows and, nearly, its columns.
        sinkhorn_iterations: rounds of Sinkhorn.
        norm: how A·S gets its range back, mask by mask. ``max``: divided by its maximum;
            ``range``: its minimum to 0 and its maximum to 1; ``area``: linear on either side of
            the threshold so that as many cells lie above it as in S; ``none``.
        peak: the quantile that counts as the maximum; 1 for the maximum itself.
        threshold: from where on S counts as foreground; it sits at 0.5 while A acts and after
            that at its own place again, so that it keeps its meaning.
        carry: ``values`` brings norm(A·S) to full size; ``difference`` only its change over S on
            the grid, so that fine edges of S survive.
        upsampling: bilinear, or along the image's edges.
        edge_radius: window of the latter, in cells of A's grid.
        edge_epsilon: squared contrast below which an edge is smoothed over.
    """

    mixing: float = 1.0
    power: float = 2.0
    form: Literal["average", "heads"] = "average"
    products: int = 1
    normalisation: Literal["row", "sinkhorn"] = "row"
    sinkhorn_iterations: int = 5
    norm: Norm = "max"
    peak: float = 1.0
    threshold: float = 0.5
    carry: Literal["values", "difference"] = "values"
    upsampling: Upsampling = "bilinear"
    edge_radius: int = 2
    edge_epsilon: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        for name in ("mixing", "peak"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                message = f"{name} is {value}; give a value from 0 to 1"
                raise ValueError(message)
        if self.power <= 0:
            message = f"power is {self.power}; give a positive value, 1 for no sharpening"
            raise ValueError(message)
        for name in ("products", "sinkhorn_iterations"):
            if getattr(self, name) < 1:
                message = f"{name} is {getattr(self, name)}; give 1 or more"
                raise ValueError(message)
        check_threshold(self.threshold)
        check_edges(self.edge_radius, self.edge_epsilon)

    @abstractmethod
    def matrices(
        self, images: Sequence[int], prompts: Sequence[str], context: RefinementContext
    ) -> list[tuple[float, AffinityMatrix]]:
        """Return the affinities of images, one matrix a token grid, each with its weight.

        Args:
            images: indices of the context's images.
            prompts: the prompt of each, as ``prompts_of`` returned it.
            context: the images.
        """

    def prompts_of(self, groups: Groups, context: RefinementContext) -> tuple[str, ...]:
        """Return the prompt that each group's affinity is computed under; empty ones here."""
        return ("",) * len(groups.images)

    @torch.no_grad()
    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return the masks after one step."""
        groups = groups_per_image(context)
        prompts = self.prompts_of(groups, context)
        centred = centre_threshold(foreground, self.threshold)
        masks = groups.gather(centred)
        found = []
        for part in context.parts(len(groups.images)):
            matrices = self.matrices(groups.images[part], prompts[part], context)
            images = context.images[list(groups.images[part])]
            found.append(self._spread(masks[part], images, matrices, context))
        target = groups.scatter(torch.cat(found))
        changed = centred + self.mixing * (target - centred)
        return restore_threshold(changed.clamp(0, 1), self.threshold)

    def _spread(
        self,
        masks: Float[Tensor, "b c H W"],
        images: Float[Tensor, "b 3 H W"],
        matrices: list[tuple[float, AffinityMatrix]],
        context: RefinementContext,
    ) -> Float[Tensor, "b c H W"]:
        """Return the weighted mean over token grids of the masks propagated on each."""
        owner = torch.arange(len(masks)).repeat_interleave(masks.shape[1]).tolist()
        total = torch.zeros_like(masks)
        for weight, matrix in matrices:
            coarse = functional.adaptive_avg_pool2d(masks, matrix.grid)
            moved = matrix.propagate(coarse.flatten(2), self.products).to(masks)
            scaled = rescale(moved, coarse.flatten(2), self.norm, self.peak)
            if self.carry == "difference":
                scaled = scaled - coarse.flatten(2)
            maps = scaled.reshape(-1, *matrix.grid)
            how = (self.upsampling, self.edge_radius, self.edge_epsilon)
            # In parts, though images are: each may have tens of classes.
            parts = context.parts(len(maps))
            fine = torch.cat([bring_up(maps[p], images[owner[p]], *how) for p in parts])
            total = total + weight * fine.view_as(masks)
        total = total / sum(weight for weight, _ in matrices)
        return masks + total if self.carry == "difference" else total

    def _matrix(
        self, records: Sequence[AttentionRecord], weights: Sequence[float]
    ) -> AffinityMatrix:
        rounds = self.sinkhorn_iterations if self.normalisation == "sinkhorn" else 0
        return AffinityMatrix(tuple(records), tuple(weights), self.form, self.power, rounds)


@dataclass(frozen=True)
class Affinity(Propagation):
    """Masks flow along the self-attention of one U-Net pass on the slightly noised image.

    One pass an image and draw, whatever the number of its classes; no decoder, no features.

    Attributes:
        timestep: t, at which the image is noised.
        draws: draws of noise, each a pass; their matrices are averaged as more heads are.
        prompt: what the U-Net is told: nothing, or the image's classes in one prompt.
        level_weights: of the U-Net's token grids, the finest first; those beyond weigh 0.
        layer_weights: by a part of the layer's dotted name, such as ``up_blocks``; the first that
            fits counts, layers that none fits are left out. None takes all alike.
    """

    timestep: int = 100
    draws: int = 1
    prompt: Literal["empty", "classes"] = "empty"
    level_weights: tuple[float, ...] = (1.0,)
    layer_weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        if self.draws < 1:
            message = f"draws is {self.draws}; give 1 or more"
            raise ValueError(message)
        weights = (*self.level_weights, *(self.layer_weights or {}).values())
        if min(weights, default=0.0) < 0 or not any(self.level_weights):
            message = (
                f"level_weights is {self.level_weights} and layer_weights {self.layer_weights}; "
                "give none below 0, and at least one level above it"
            )
            raise ValueError(message)

    def prompts_of(self, groups: Groups, context: RefinementContext) -> tuple[str, ...]:
        """Return each image's prompt."""
        if self.prompt == "empty":
            return super().prompts_of(groups, context)
        names = context.class_names
        return tuple(context.prompt(tuple(names[m] for m in g))[0] for g in groups.members)

    def matrices(
        self, images: Sequence[int], prompts: Sequence[str], context: RefinementContext
    ) -> list[tuple[float, AffinityMatrix]]:
        """Return the weighted self-attention of every token grid that has a weight.

        Raises:
            ValueError: no layer is left by the weights.
        """
        records = self._records(images, prompts, context)
        sizes = sorted({r.grid[0] * r.grid[1] for r in records}, reverse=True)
        found = []
        for weight, size in zip(self.level_weights, sizes, strict=False):
            members = [r for r in records if r.grid[0] * r.grid[1] == size]
            weighted = [(r, w) for r in members if (w := self._layer_weight(r.layer)) > 0]
            if weight > 0 and weighted:
                layers, weights = zip(*weighted, strict=True)
                found.append((weight, self._matrix(layers, weights)))
        if not found:
            message = (
                f"level_weights {self.level_weights} and layer_weights {self.layer_weights} leave "
                f"none of the layers {[record.layer for record in records]}"
            )
            raise ValueError(message)
        return found

    def _records(
        self, images: Sequence[int], prompts: Sequence[str], context: RefinementContext
    ) -> list[AttentionRecord]:
        generator, clean = context.generator, context.latents[list(images)]
        embeddings = context.embed(tuple(prompts))
        image_ids = tuple(context.image_ids[image] for image in images)
        per_draw = []
        for draw in range(self.draws):
            noise = context.noise(image_ids, ("",) * len(images), draw)
            noisy = add_noise(clean, noise, generator.alphas_cumprod, self.timestep)
            per_draw.append(generator.self_attention(noisy, self.timestep, embeddings))
        return [more_heads(layer) for layer in zip(*per_draw, strict=True)]

    def _layer_weight(self, layer: str) -> float:
        if self.layer_weights is None:
            return 1.0
        fitting = (weight for part, weight in self.layer_weights.items() if part in layer)
        return next(fitting, 0.0)


def rescale(
    moved: Float[Tensor, "b c n"],
    before: Float[Tensor, "b c n"],
    norm: Norm,
    peak: float = 1.0,
) -> Float[Tensor, "b c n"]:
    """Return propagated masks with their range restored, each by itself.

    Args:
        moved: A·S.
        before: S, whose threshold sits at 0.5.
        norm: as in ``Propagation``.
        peak: the quantile that counts as the maximum.
    """
    tiny = torch.finfo(moved.dtype).tiny
    ordered = moved.sort(-1).values
    top = ordered[..., round(peak * (moved.shape[-1] - 1)), None]
    match norm:
        case "none":
            return moved
        case "max":
            return (moved / top.clamp_min(tiny)).clamp(0, 1)
        case "range":
            low = ordered[..., :1]
            stretched = ((moved - low) / (top - low).clamp_min(tiny)).clamp(0, 1)
            # A flat mask stays flat up to rounding, which would be stretched to all of [0, 1].
            return torch.where(top - low > _FLAT * top, stretched, before)
        case "area":
            kept = (before >= 0.5).sum(-1, keepdim=True)
            last = (moved.shape[-1] - kept).clamp_max(moved.shape[-1] - 1)
            border = ordered.gather(-1, last)
            below = 0.5 * moved / border.clamp_min(tiny)
            above = 0.5 + 0.5 * (moved - border) / (top - border).clamp_min(tiny)
            inside = (moved >= border) & (kept > 0)
            # Without any cell above, the largest stays just below one half.
            outside = below.clamp(0, 0.5 - 1e-6)
            return torch.where(inside, above, outside).clamp(0, 1)
