"""Null-text inversion (Mokady et al. 2023) in place of noise, then the paper's update (Table IV).

An embedding of "nothing" is fitted so that generation under guidance gives the image back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.ddim import DDIMPath, clean_and_noise, ddim_invert, ddim_move, ddim_path
from g4seg_pl.core.descent import AdamMoments, gradient_of
from g4seg_pl.core.generation import Rows
from g4seg_pl.core.injection import Injection
from g4seg_pl.core.protocols import PredictionType
from g4seg_pl.core.steps import Correspondence

# The raw output of a network for a latent, a timestep and an embedding a row.
Conditional = Callable[[Tensor, int, Tensor], Tensor]


@dataclass(frozen=True)
class NullTextFit:
    """How the embedding of "nothing" is fitted, step by step of the path.

    Attributes:
        inner_steps: Adam's, at each step of the path; 0 keeps the embedding.
        learning_rate: at the noisiest step; it falls linearly to about half at the last.
        stop_below: a row stops once its loss is below this, plus ``stop_growth`` a step before.
        stop_growth: see ``stop_below``.
    """

    inner_steps: int = 10
    learning_rate: float = 0.01
    stop_below: float = 1e-5
    stop_growth: float = 2e-5


@dataclass(frozen=True)
class Guided:
    """A network under classifier-free guidance.

    Attributes:
        conditional: the network with the prompt, and with the masks if they are injected.
        unconditional: the network with the embedding it is given in the prompt's place.
        scale: of the guidance; 1 leaves the unconditional half without effect.
        prediction_type: what both return.
    """

    conditional: Callable[[Tensor, int], Tensor]
    unconditional: Conditional
    scale: float
    prediction_type: PredictionType

    def output(
        self, latent: Float[Tensor, "r c h w"], timestep: int, embedding: Float[Tensor, "r l d"]
    ) -> Float[Tensor, "r c h w"]:
        """Return the guided output."""
        told = self.conditional(latent, timestep)
        return self.combine(told, self.unconditional(latent, timestep, embedding))

    def combine(self, told: Tensor, untold: Tensor) -> Tensor:
        """Return both halves' guided output."""
        return untold + self.scale * (told - untold)


def fit_null_embeddings(
    levels: Float[Tensor, "n r c h w"],
    path: DDIMPath,
    guided: Guided,
    start: Float[Tensor, "r l d"],
    fit: NullTextFit,
    count: int | None = None,
) -> list[Float[Tensor, "r l d"]]:
    """Return an embedding a step, from the noisiest on, under which the path leads back.

    Each step begins with the embedding, and the latent, that the one before arrived at. Every row
    is fitted by itself: which others are fitted beside it makes no difference.

    Args:
        levels: the inverted latents, the image's first.
        path: the levels' timesteps.
        guided: the network.
        start: the prompt "" of every row.
        fit: how.
        count: only the first so many steps; None for all.
    """
    latent, embedding = levels[-1], start.float()
    found: list[Tensor] = []
    count = len(path) if count is None else count
    for number in range(count):
        level = len(path) - number
        rate = fit.learning_rate * (1 - number / (2 * len(path)))
        limit = fit.stop_below + number * fit.stop_growth
        step = _Step(path, level, guided)
        told = guided.conditional(latent, path.timesteps[level - 1])
        target = levels[level - 1]
        embedding = _fit_one(step, latent, told, target, embedding, (fit.inner_steps, rate, limit))
        found.append(embedding)
        if number + 1 < count:
            latent = step.down(latent, told, embedding)
    return found


def regenerate(
    noisy: Float[Tensor, "r c h w"],
    path: DDIMPath,
    guided: Guided,
    embeddings: list[Float[Tensor, "r l d"]],
) -> Float[Tensor, "r c h w"]:
    """Return z₀ generated from the path's noisiest latent, an embedding of "nothing" a step."""
    latent = noisy
    for number, embedding in enumerate(embeddings):
        step = _Step(path, len(path) - number, guided)
        latent = step.down(latent, guided.conditional(latent, step.timestep), embedding)
    return latent


@dataclass(frozen=True)
class _Step:
    """One step down the path, from a level to the one below."""

    path: DDIMPath
    level: int
    guided: Guided

    @property
    def timestep(self) -> int:
        return self.path.timesteps[self.level - 1]

    def down(self, latent: Tensor, told: Tensor, embedding: Tensor) -> Tensor:
        untold = self.guided.unconditional(latent, self.timestep, embedding)
        output = self.guided.combine(told, untold)
        here, below = self.path.alphas[self.level], self.path.alphas[self.level - 1]
        return ddim_move(latent, output, here, below, self.guided.prediction_type)


def _fit_one(
    step: _Step,
    latent: Tensor,
    told: Tensor,
    target: Tensor,
    embedding: Tensor,
    schedule: tuple[int, float, float],
) -> Tensor:
    """Return the embedding after Adam's steps on one step's squared error."""
    inner_steps, rate, limit = schedule
    moments = AdamMoments()
    active: Bool[Tensor, " r"] = torch.ones(len(latent), dtype=torch.bool, device=latent.device)
    for _ in range(inner_steps):
        with torch.enable_grad():
            variable = embedding.detach().requires_grad_()
            losses = (step.down(latent, told, variable) - target).square().flatten(1).mean(1)
            # A sum: a row's gradient must not depend on how many stand beside it.
            gradient = gradient_of(losses.sum(), variable)
        moved = embedding - rate * moments.direction(gradient, epsilon=1e-8)
        embedding = torch.where(active[:, None, None], moved, embedding)
        active = active & (losses.detach() >= limit)
        if not active.any():
            break
    return embedding


@dataclass(frozen=True)
class NullTextCorrespondence(Correspondence):
    """The paper's update on an image generated by null-text inversion (NtI) in place of noise.

    The latent is inverted by DDIM, the embedding of "" fitted so that generation under guidance
    leads back to it, and the image generated again with the mask injected into the conditional
    half. There is no noise to draw. The paper says no more than the name; each reading is a field.

    Attributes:
        timestep: how far the image is inverted: to the last step of the path at or below; 999 is
            the whole path.
        guidance_scale: under which the image is generated.
        ddim_steps: of the whole path.
        inner_steps: of the fit, at each step of the path; 0 is plain DDIM under guidance.
        learning_rate: of the fit at its first step; it falls linearly to half.
        stop_below: a step's fit ends once its mean squared error is below this ...
        stop_growth: ... plus this for every step before.
        regeneration: ``path`` generates by all steps of the path; ``single`` fits the noisiest
            step alone and takes ẑ₀ from its one pass, as Eq. 2 does from noise.
        inversion_prompt: the class's prompt, as Mokady et al. invert, or none.
        fit_injected: fit with the mask injected already, so that it explains as much as it can;
            otherwise the mask comes in afterwards and shows in what it spoils.
        checkpointing: recompute activations instead of keeping them: less memory, more time.
    """

    timestep: int = 999
    guidance_scale: float = 7.5
    ddim_steps: int = 50
    inner_steps: int = 10
    learning_rate: float = 0.01
    stop_below: float = 1e-5
    stop_growth: float = 2e-5
    regeneration: Literal["path", "single"] = "path"
    inversion_prompt: Literal["class", "empty"] = "class"
    fit_injected: bool = False
    checkpointing: bool = False

    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        for name, least in (("ddim_steps", 1), ("inner_steps", 0), ("stop_below", 0)):
            if getattr(self, name) < least:
                message = f"{name} is {getattr(self, name)}; give {least} or more"
                raise ValueError(message)
        if self.learning_rate <= 0:
            message = f"learning_rate is {self.learning_rate}; give a positive value"
            raise ValueError(message)

    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return S* of every mask; may be called in inference mode."""
        with torch.inference_mode(mode=False), torch.no_grad():
            # A tensor made in inference mode can enter no gradient; its copy made here can.
            return super().__call__(foreground.clone(), context)

    def generate(self, rows: Rows, context: RefinementContext) -> Float[Tensor, "r 3 H W"]:
        """Return each row's image, generated from its own inverted latent under the mask."""
        generator = context.generator
        path = ddim_path(generator.alphas_cumprod, self.ddim_steps, self.timestep)
        levels = self.inverted(rows, context, path)
        plain, injected = self._networks(rows, context)
        nothing = context.embed(("",) * len(rows))
        count = 1 if self.regeneration == "single" else None
        fitted = injected if self.fit_injected else plain
        embeddings = fit_null_embeddings(levels, path, fitted, nothing, self._fit, count)
        if self.regeneration == "path":
            return generator.decode(regenerate(levels[-1], path, injected, embeddings))
        output = injected.output(levels[-1], path.timesteps[-1], embeddings[0])
        kind = generator.prediction_type
        clean, _ = clean_and_noise(levels[-1], output, path.alphas[-1], kind)
        return generator.decode(clean)

    def inverted(
        self, rows: Rows, context: RefinementContext, path: DDIMPath
    ) -> Float[Tensor, "n r c h w"]:
        """Return the latents of each row's image at all levels of the path."""
        generator = context.generator
        empty = ("",) * len(rows)
        embeddings = context.embed(rows.prompts if self.inversion_prompt == "class" else empty)
        return ddim_invert(
            context.latents[list(rows.owner)],
            path,
            lambda latent, timestep: generator.denoise(latent, timestep, embeddings),
            generator.prediction_type,
        )

    @property
    def _fit(self) -> NullTextFit:
        return NullTextFit(self.inner_steps, self.learning_rate, self.stop_below, self.stop_growth)

    def _networks(self, rows: Rows, context: RefinementContext) -> tuple[Guided, Guided]:
        """Return the guided network without and with the masks injected."""
        generator, prompts = context.generator, context.embed(rows.prompts)
        extra = {"checkpointing": True} if self.checkpointing else {}

        def network(injection: Injection | None) -> Guided:
            return Guided(
                lambda latent, t: generator.denoise(latent, t, prompts, injection),
                lambda latent, t, text: generator.denoise(latent, t, text, None, **extra),
                self.guidance_scale,
                generator.prediction_type,
            )

        return network(None), network(self.injection(rows))
