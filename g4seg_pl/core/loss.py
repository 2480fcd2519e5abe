"""The denoising loss of images under injected masks: -log p(x|S) but for constants (Eq. 6-7)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.diffusion import predict_clean
from g4seg_pl.core.generation import Rows, denoise, noised
from g4seg_pl.core.injection import Injection

LossKind = Literal["epsilon", "clean", "velocity", "image"]


@dataclass(frozen=True)
class DenoisingLoss:
    """How masks are injected and what the prediction is compared with.

    Attributes:
        injection_weight: w of Eq. 5.
        kind: mean square of ε - ε̂, of z₀ - ẑ₀, of v - v̂, or of x₀ - x̃₀. At one timestep the first
            three differ by a constant factor; the last costs the decoder.
        cross_attention: inject into cross-attention (Eq. 3).
        self_attention: inject into self-attention (Eq. 4).
        binarise_at: from where on a mask counts as 1; None injects it soft, differentiable.
        mask_resize: how masks come to an attention layer's token grid.
        checkpointing: recompute activations for a gradient instead of keeping them.
    """

    injection_weight: float
    kind: LossKind = "epsilon"
    cross_attention: bool = True
    self_attention: bool = True
    binarise_at: float | None = 0.5
    mask_resize: Literal["nearest", "area"] = "area"
    checkpointing: bool = False

    def maps(
        self, rows: Rows, context: RefinementContext, timestep: int, draw: int
    ) -> Float[Tensor, "r h w"]:
        """Return each row's squared error, mean over channels, at every place.

        Rows with the same images, noise names, timestep and draw meet the same noise, whatever
        their masks and prompts.

        Args:
            rows: images, prompts and masks.
            context: the images.
            timestep: t.
            draw: number of the draw of noise.

        Raises:
            FloatingPointError: the prediction is not finite.
        """
        noisy, _ = noised(rows, context, timestep, draw)
        injection = Injection(
            rows.foreground,
            rows.tokens,
            self.injection_weight,
            cross_attention=self.cross_attention,
            self_attention=self.self_attention,
            binarise_at=self.binarise_at,
            resize=self.mask_resize,
            classes=rows.classes,
        )
        output = denoise(
            rows, context, noisy, timestep, injection, checkpointing=self.checkpointing
        )
        generator, owner = context.generator, list(rows.owner)
        alphas = generator.alphas_cumprod
        clean = predict_clean(noisy, output, alphas, timestep, generator.prediction_type)
        if self.kind == "image":
            # Taken apart from the caller's tensor, which may come from inference mode.
            error = generator.decode(clean) - context.images[owner].clone()
        else:
            error = clean - context.latents[owner]
        if not torch.isfinite(error).all():
            message = (
                f"the denoising loss at timestep {timestep} is not finite; "
                "a float16 model overflows, load it in bfloat16 or float32"
            )
            raise FloatingPointError(message)
        return error.square().mean(1) * _factor(self.kind, float(alphas[timestep]))

    def per_row(
        self, rows: Rows, context: RefinementContext, timestep: int, draw: int
    ) -> Float[Tensor, " r"]:
        """Return each row's loss."""
        return self.maps(rows, context, timestep, draw).flatten(1).mean(1)


def _factor(kind: LossKind, alpha: float) -> float:
    """Return the ratio of a squared error to that of the clean latent.

    From z_t = √ᾱ z₀ + √(1-ᾱ) ε follow ε - ε̂ = -√(ᾱ/(1-ᾱ)) (z₀ - ẑ₀) and, with
    v = √ᾱ ε - √(1-ᾱ) z₀, v - v̂ = -(z₀ - ẑ₀)/√(1-ᾱ).
    """
    match kind:
        case "epsilon":
            return alpha / (1 - alpha)
        case "velocity":
            return 1 / (1 - alpha)
        case _:
            return 1.0
