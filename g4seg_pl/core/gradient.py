"""Gradient: masks move down the denoising loss (Eq. 7), which rank-one injection makes exact."""

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.descent import (
    AdamMoments,
    Parametrisation,
    gradient_of,
    normalised_direction,
)
from g4seg_pl.core.generation import (
    Groups,
    Rows,
    groups_per_class,
    groups_per_image,
    rows_per_class,
    rows_per_image,
)
from g4seg_pl.core.guided import Upsampling, bring_up, check_edges
from g4seg_pl.core.loss import DenoisingLoss, LossKind
from g4seg_pl.core.threshold import centre_threshold, check_threshold, restore_threshold


@dataclass(frozen=True)
class Gradient:
    """Masks go a few steps down the denoising loss of their image, weights frozen.

    The soft mask, on the latent's grid, enters attention as one more channel; the gradient is
    that of the fused kernels. A mask is brought to the grid, moved there, and its change brought
    back to full size.

    Attributes:
        timesteps: every step averages over them.
        draws: draws of noise at each timestep of each step.
        iterations: steps.
        fresh_noise: each step draws its own noise; otherwise all see the same.
        step_size: γ.
        injection_weight: w of Eq. 5.
        rule: ``normalised``: S moves by γ times the gradient, centred, in units of its standard
            deviation, clipped; ``adam``: Adam on the logits; ``mirror``: the logits move by the
            normalised gradient with respect to S (mirror descent under entropy).
        clip: at how many standard deviations.
        centre: take each gradient's mean off.
        loss: what is compared: noise, clean latent, velocity, or the decoded image.
        relative_loss: take the gradient of the loss's logarithm, so that timesteps and draws of
            large loss do not outweigh others.
        prompt: the class's (of all classes, if they compete), none, or the gradient under the
            former less that under the latter.
        control_variate: subtract, under the same noise, the gradient at an ``empty`` or a
            ``flat`` (0.5) mask; or go on from the ``previous`` step's estimate with the
            difference that the mask made.
        carry_over: how much of the previous estimate goes on, in [0, 1].
        trust_region: no pixel moves further from where this update found it; None for any far.
        threshold: from where on S counts as foreground; it sits at 0.5 meanwhile.
        classes_compete: the classes of an image and its background share each pixel by a softmax,
            in one pass.
        inject_background: inject the background too, as a class without word, if they compete.
        noise_per: whether each class draws its own noise or an image's share it.
        inject_cross_attention: inject into cross-attention (Eq. 3).
        inject_self_attention: inject into self-attention (Eq. 4).
        mask_resize: how masks come to an attention layer's token grid.
        logit_margin: masks keep this distance from 0 and 1 where logits are taken.
        upsampling: of the change: bilinear, or along the image's edges.
        edge_radius: window of the latter, in latent cells.
        edge_epsilon: squared contrast below which an edge is smoothed over.
        checkpointing: recompute activations instead of keeping them: less memory, more time.
    """

    timesteps: tuple[int, ...] = (500,)
    draws: int = 1
    iterations: int = 4
    fresh_noise: bool = True
    step_size: float = 0.05
    injection_weight: float = 10.0
    rule: Literal["normalised", "adam", "mirror"] = "normalised"
    clip: float = 3.0
    centre: bool = True
    loss: LossKind = "epsilon"
    relative_loss: bool = True
    prompt: Literal["class", "empty", "class_minus_empty"] = "class"
    control_variate: Literal["none", "empty", "flat", "previous"] = "none"
    carry_over: float = 0.5
    trust_region: float | None = None
    threshold: float = 0.5
    classes_compete: bool = False
    inject_background: bool = False
    noise_per: Literal["class", "image"] = "class"
    inject_cross_attention: bool = True
    inject_self_attention: bool = True
    mask_resize: Literal["nearest", "area"] = "area"
    logit_margin: float = 0.02
    upsampling: Upsampling = "bilinear"
    edge_radius: int = 2
    edge_epsilon: float = 1e-3
    checkpointing: bool = False

    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        for name in ("draws", "iterations"):
            if getattr(self, name) < 1:
                message = f"{name} is {getattr(self, name)}; give 1 or more"
                raise ValueError(message)
        for name in ("step_size", "injection_weight", "clip"):
            if getattr(self, name) <= 0:
                message = f"{name} is {getattr(self, name)}; give a positive value"
                raise ValueError(message)
        if self.trust_region is not None and self.trust_region <= 0:
            message = f"trust_region is {self.trust_region}; give a positive value, None for none"
            raise ValueError(message)
        if not self.timesteps:
            message = "timesteps is empty; give at least one"
            raise ValueError(message)
        if not 0 <= self.carry_over <= 1 or not 0 < self.logit_margin < 0.5:
            message = (
                f"carry_over is {self.carry_over} and logit_margin {self.logit_margin}; "
                "give the one in [0, 1], the other between 0 and 0.5"
            )
            raise ValueError(message)
        if not (self.inject_cross_attention or self.inject_self_attention):
            message = "nothing is injected, so there is no gradient; inject into some attention"
            raise ValueError(message)
        check_threshold(self.threshold)
        check_edges(self.edge_radius, self.edge_epsilon)

    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return the masks after all iterations; may be called in inference mode."""
        with torch.inference_mode(mode=False), torch.no_grad():
            # A tensor made in inference mode can enter no gradient; its copy made here can.
            seed = foreground.clone()
            bounds = None
            if self.trust_region is not None:
                reach = (seed - self.trust_region, seed + self.trust_region)
                low, high = (centre_threshold(each.clamp(0, 1), self.threshold) for each in reach)
                bounds = (low, high)
            refined = self._descend(centre_threshold(seed, self.threshold), bounds, context)
            return restore_threshold(refined, self.threshold)

    def gradient(
        self,
        leaf: Float[Tensor, "r k h w"],
        space: Parametrisation,
        rows: Rows,
        context: RefinementContext,
        iteration: int = 0,
    ) -> Float[Tensor, "r k h w"]:
        """Return the loss's mean gradient over timesteps and draws, what is taken off included.

        Args:
            leaf: what is moved: masks on the latent's grid, or their logits.
            space: how masks come from it.
            rows: images, prompts and tokens; their masks are not looked at.
            context: the images.
            iteration: counts the steps, for fresh noise.
        """
        first = iteration * self.draws if self.fresh_noise else 0
        pairs = list(product(self.timesteps, range(first, first + self.draws)))
        parts = []
        for part in context.parts(len(rows)):
            total = torch.zeros_like(leaf[part])
            for sign, place, told in self._terms(leaf[part], space.part(part), rows.part(part)):
                for timestep, draw in pairs:
                    found = self._plain(place, space.part(part), told, context, timestep, draw)
                    total += sign * found
            parts.append(total / len(pairs))
        return torch.cat(parts)

    def space(self, groups: Groups, like: Tensor) -> Parametrisation:
        """Return what is moved: masks, their logits, or the shares of competing classes."""
        most = max(len(group) for group in groups.members)
        present = [[slot < len(group) for slot in range(most)] for group in groups.members]
        marks = torch.tensor(present, device=like.device)
        if self.classes_compete:
            return Parametrisation("softmax", marks, self.logit_margin)
        kind: Literal["linear", "logit"] = "linear" if self.rule == "normalised" else "logit"
        return Parametrisation(kind, marks, self.logit_margin)

    def rows(self, foreground: Tensor, context: RefinementContext) -> tuple[Groups, Rows]:
        """Return what goes through the U-Net: a row a mask, or an image if classes compete."""
        if not self.classes_compete:
            own = self.noise_per == "class"
            return groups_per_class(context), rows_per_class(foreground, context, own_noise=own)
        return groups_per_image(context), rows_per_image(foreground, context)

    def _descend(
        self, seed: Tensor, bounds: tuple[Tensor, Tensor] | None, context: RefinementContext
    ) -> Tensor:
        groups, rows = self.rows(seed, context)
        grid = (context.latents.shape[2], context.latents.shape[3])
        space, moments = self.space(groups, seed), AdamMoments()
        foreground, earlier = seed, None
        for iteration in range(self.iterations):
            leaf = space.leaf(groups.gather(functional.adaptive_avg_pool2d(foreground, grid)))
            gradient = self.gradient(leaf, space, rows, context, iteration)
            if self.control_variate == "previous":
                if earlier is not None:
                    again = self.gradient(earlier[0], space, rows, context, iteration)
                    gradient = gradient + self.carry_over * (earlier[1] - again)
                earlier = leaf, gradient
            moved = leaf - self.step_size * self._direction(gradient, moments)
            change = space.classes(space.masks(moved) - space.masks(leaf))
            foreground = self._moved(foreground, groups.scatter(change), bounds, context)
        context.record("gradient", groups.scatter(space.classes(gradient)))
        return foreground

    def _terms(
        self, leaf: Tensor, space: Parametrisation, rows: Rows
    ) -> list[tuple[float, Tensor, Rows]]:
        """Return what the gradient is made of: sign, place and prompts of each gradient."""
        none = torch.zeros_like(rows.tokens)
        wordless = replace(rows, prompts=("",) * len(rows), tokens=none)
        terms = [(1.0, leaf, wordless if self.prompt == "empty" else rows)]
        if self.prompt == "class_minus_empty":
            terms.append((-1.0, leaf, wordless))
        if self.control_variate in ("empty", "flat"):
            place = space.constant(leaf, 0.0 if self.control_variate == "empty" else 0.5)
            terms += [(-sign, place, told) for sign, _, told in terms]
        return terms

    def _plain(
        self,
        place: Tensor,
        space: Parametrisation,
        rows: Rows,
        context: RefinementContext,
        timestep: int,
        draw: int,
    ) -> Tensor:
        """Return the gradient of each row's loss at one place under one noise."""
        with torch.enable_grad():
            variable = place.detach().requires_grad_()
            masks = space.masks(variable)
            if self.rule == "mirror":
                variable = masks = masks.detach().requires_grad_()
            tokens = rows.tokens
            if self.classes_compete and self.inject_background:
                tokens = functional.pad(tokens, (0, 0, 0, 1))
            else:
                masks = space.classes(masks)
            injected = replace(rows, foreground=masks, tokens=tokens)
            losses = self._loss.per_row(injected, context, timestep, draw)
            objective = losses.log() if self.relative_loss else losses
            return gradient_of(objective.sum(), variable)

    @property
    def _loss(self) -> DenoisingLoss:
        return DenoisingLoss(
            self.injection_weight,
            self.loss,
            cross_attention=self.inject_cross_attention,
            self_attention=self.inject_self_attention,
            binarise_at=None,
            mask_resize=self.mask_resize,
            checkpointing=self.checkpointing,
        )

    def _direction(self, gradient: Tensor, moments: AdamMoments) -> Tensor:
        if self.rule == "adam":
            return moments.direction(gradient)
        return normalised_direction(gradient, self.clip, centre=self.centre)

    def _moved(
        self,
        foreground: Tensor,
        change: Tensor,
        bounds: tuple[Tensor, Tensor] | None,
        context: RefinementContext,
    ) -> Tensor:
        """Return the masks after a change on the latent's grid, within the trust region."""
        images = context.images[context.owner.tolist()]
        how = self.upsampling
        fine = bring_up(change, images, how, self.edge_radius, self.edge_epsilon)
        moved = foreground + fine.to(foreground)
        if bounds is not None:
            moved = moved.clamp(*bounds)
        return moved.clamp(0, 1)
