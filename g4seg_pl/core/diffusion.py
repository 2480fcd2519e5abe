"""Noise once, denoise once: the two closed forms around a single U-Net pass (Eq. 2)."""

import hashlib
from collections.abc import Sequence
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.core.protocols import PredictionType


def add_noise(
    clean: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, " t"],
    timestep: int,
) -> Float[Tensor, "b c h w"]:
    """Return z_t = √ᾱ_t z₀ + √(1-ᾱ_t) ε.

    Args:
        clean: scaled latents z₀.
        noise: standard normal ε.
        alphas_cumprod: the schedule's ᾱ.
        timestep: t, 0 to the schedule's length less one.

    Raises:
        ValueError: the timestep lies outside the schedule.
    """
    signal, spread = _signal_and_spread(alphas_cumprod, timestep)
    return signal * clean + spread * noise


def predict_clean(
    noisy: Float[Tensor, "b c h w"],
    output: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, " t"],
    timestep: int,
    prediction_type: PredictionType,
) -> Float[Tensor, "b c h w"]:
    """Return ẑ₀ from one U-Net output (Eq. 2 for ε, its counterpart for v).

    Args:
        noisy: z_t.
        output: the raw U-Net output at ``timestep``.
        alphas_cumprod: the schedule's ᾱ.
        timestep: t, 0 to the schedule's length less one.
        prediction_type: what the output is: the noise, the velocity or ẑ₀ itself.

    Raises:
        ValueError: the timestep lies outside the schedule, or the prediction is of no known type.
    """
    signal, spread = _signal_and_spread(alphas_cumprod, timestep)
    match prediction_type:
        case "epsilon":
            return (noisy - spread * output) / signal
        case "v_prediction":
            return signal * noisy - spread * output
        case "sample":
            return output
        case _:
            known = ", ".join(get_args(PredictionType))
            message = f"prediction_type is {prediction_type!r}; this knows {known}"
            raise ValueError(message)


def seeded_noise(
    shape: Sequence[int], seed: int, image_id: str, class_name: str, draw: int = 0
) -> Tensor:
    """Return standard normal noise that depends on its four keys and on nothing else.

    It is drawn on the CPU in float32, so that batch, order, device and number format do not
    matter and a resumed or distributed run meets the same noise.

    Args:
        shape: shape of one latent.
        seed: the run's seed.
        image_id: the image's name.
        class_name: the class's name; empty for noise shared by all classes of an image.
        draw: counts independent draws for the same mask.
    """
    key = "\x00".join((str(seed), image_id, class_name, str(draw)))
    # 63 bits: the largest seed a torch generator takes is a signed 64-bit integer.
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator("cpu").manual_seed(number)
    # Both named: torch's defaults are a program's own choice, and other formats draw other numbers.
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def _signal_and_spread(alphas_cumprod: Tensor, timestep: int) -> tuple[float, float]:
    if not 0 <= timestep < len(alphas_cumprod):
        message = f"timestep is {timestep}; the schedule has 0 to {len(alphas_cumprod) - 1}"
        raise ValueError(message)
    signal_power = float(alphas_cumprod[timestep])
    return signal_power**0.5, (1 - signal_power) ** 0.5
