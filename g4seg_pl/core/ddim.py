"""Deterministic DDIM in both directions: from an image's latent to noise, and back (Song 2021)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.core.protocols import PredictionType

# The raw output of a network for a latent at a timestep.
Predict = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class DDIMPath:
    """The noise levels that DDIM visits; level 0 is the image's latent.

    Attributes:
        timesteps: ``n`` of them, ascending: the network's at levels 1 to n.
        alphas: ᾱ of levels 0 to n.
    """

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.timesteps)


def ddim_path(
    alphas_cumprod: Float[Tensor, " t"], steps: int, highest: int | None = None, offset: int = 1
) -> DDIMPath:
    """Return the path of Stable Diffusion's own DDIM configuration.

    Timesteps are spaced ``leading``: multiples of T // steps, plus the offset. Level 0 has the ᾱ of
    timestep 0, as with ``set_alpha_to_one: false``.

    Args:
        alphas_cumprod: the schedule's ᾱ.
        steps: how many the whole path has, 1 to T - 1.
        highest: leave out the timesteps above; None keeps the whole path.
        offset: added to every timestep.

    Raises:
        ValueError: the steps do not fit the schedule, or no timestep is left.
    """
    total = len(alphas_cumprod)
    if not 1 <= steps < total:
        message = f"ddim_steps is {steps}; of {total} timesteps give 1 to {total - 1}"
        raise ValueError(message)
    every = (index * (total // steps) + offset for index in range(steps))
    kept = tuple(t for t in every if highest is None or t <= highest)
    if not kept:
        message = f"timestep is {highest}; the first of {steps} DDIM steps is at {offset}"
        raise ValueError(message)
    levels = alphas_cumprod[[0, *kept]].cpu().double()  # MPS has no float64
    return DDIMPath(kept, tuple(float(alpha) for alpha in levels))


def clean_and_noise(
    latent: Float[Tensor, "b c h w"],
    output: Float[Tensor, "b c h w"],
    alpha: float,
    prediction_type: PredictionType,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Return ẑ₀ and ε̂, the two parts that a latent is taken for.

    Args:
        latent: √ᾱ ẑ₀ + √(1-ᾱ) ε̂.
        output: the raw network output for it.
        alpha: its ᾱ, below 1.
        prediction_type: what the output is.
    """
    signal, spread = math.sqrt(alpha), math.sqrt(1 - alpha)
    match prediction_type:
        case "epsilon":
            return (latent - spread * output) / signal, output
        case "v_prediction":
            return signal * latent - spread * output, signal * output + spread * latent
        case "sample":
            return output, (latent - signal * output) / spread


def ddim_move(
    latent: Float[Tensor, "b c h w"],
    output: Float[Tensor, "b c h w"],
    alpha: float,
    other: float,
    prediction_type: PredictionType,
) -> Float[Tensor, "b c h w"]:
    """Return the latent at another noise level, more or less noisy: √ᾱ' ẑ₀ + √(1-ᾱ') ε̂.

    Args:
        latent: at ``alpha``.
        output: the raw network output for it.
        alpha: ᾱ where it is.
        other: ᾱ' where it goes.
        prediction_type: what the output is.
    """
    clean, noise = clean_and_noise(latent, output, alpha, prediction_type)
    return math.sqrt(other) * clean + math.sqrt(1 - other) * noise


def ddim_invert(
    latents: Float[Tensor, "b c h w"],
    path: DDIMPath,
    predict: Predict,
    prediction_type: PredictionType,
) -> Float[Tensor, "n b c h w"]:
    """Return the latents at all levels of the path, the given ones first.

    The step up to a level asks the network at that level's timestep, about the latent of the
    level below (Mokady et al. 2023): a step down would undo it, were the output the same there.

    Args:
        latents: z₀, scaled.
        path: the levels.
        predict: the network, without guidance.
        prediction_type: what it returns.
    """
    levels = [latents]
    for index, timestep in enumerate(path.timesteps):
        output = predict(levels[-1], timestep)
        here, above = path.alphas[index], path.alphas[index + 1]
        levels.append(ddim_move(levels[-1], output, here, above, prediction_type))
    return torch.stack(levels)
