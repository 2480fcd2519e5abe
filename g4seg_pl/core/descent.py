"""How masks are moved along a gradient: the variable that moves, and the direction it takes."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# A power of two changes no digit of a float32 or bfloat16.
_SCALE = 2.0**14


@dataclass(frozen=True)
class Parametrisation:
    """The variable behind masks.

    Attributes:
        kind: ``linear``: the masks themselves; ``logit``: their logits; ``softmax``: the
            logarithms of all classes' and, last, the background's share.
        present: ``(r, c)``, which masks of a row exist; the others fill up.
        margin: masks keep this distance from 0 and 1 where logarithms are taken.
    """

    kind: Literal["linear", "logit", "softmax"]
    present: Bool[Tensor, "r c"]
    margin: float = 0.02

    def leaf(self, masks: Float[Tensor, "r c h w"]) -> Float[Tensor, "r k h w"]:
        """Return the variable for masks in [0, 1]; k is c, or with a softmax c + 1.

        The background takes what the strongest class leaves over.
        """
        if self.kind == "linear":
            return masks
        inside = masks.clamp(self.margin, 1 - self.margin)
        if self.kind == "logit":
            return inside.logit()
        absent = ~self.present[:, :, None, None]
        shares = inside.log().masked_fill(absent, -torch.inf)
        background = 1 - inside.masked_fill(absent, 0).amax(1, keepdim=True)
        return torch.cat([shares, background.log()], dim=1)

    def masks(self, leaf: Float[Tensor, "r k h w"]) -> Float[Tensor, "r k h w"]:
        """Return the masks of the variable, the background's last with a softmax."""
        match self.kind:
            case "linear":
                return leaf
            case "logit":
                return leaf.sigmoid()
            case "softmax":
                return leaf.softmax(1)

    def classes(self, masks: Float[Tensor, "r k h w"]) -> Float[Tensor, "r c h w"]:
        """Return what belongs to the classes, the background left out."""
        return masks[:, :-1] if self.kind == "softmax" else masks

    def constant(self, leaf: Float[Tensor, "r k h w"], level: float) -> Float[Tensor, "r k h w"]:
        """Return a variable like the given one, of masks that are the same everywhere."""
        return self.leaf(torch.full_like(self.classes(leaf), level))

    def part(self, part: slice) -> "Parametrisation":
        """Return the same for a slice of the rows."""
        return Parametrisation(self.kind, self.present[part], self.margin)


@dataclass
class AdamMoments:
    """Adam's running moments (Kingma and Ba 2015), with their usual decay.

    Attributes:
        first: mean of the gradients.
        second: mean of their squares.
        count: how many were seen.
    """

    first: Tensor | None = None
    second: Tensor | None = None
    count: int = 0

    def direction(
        self,
        gradient: Float[Tensor, "..."],
        decay: float = 0.9,
        square_decay: float = 0.999,
        epsilon: float = 0.0,
    ) -> Float[Tensor, "..."]:
        """Return the direction of one more step, and remember its gradient.

        Args:
            gradient: of any shape, the same every time.
            decay: of the mean.
            square_decay: of the squares' mean.
            epsilon: added to the spread; 0 is blind to the gradient's size.
        """
        zero = torch.zeros_like(gradient)
        self.count += 1
        self.first = torch.lerp(gradient, zero if self.first is None else self.first, decay)
        before = zero if self.second is None else self.second
        self.second = torch.lerp(gradient.square(), before, square_decay)
        mean = self.first / (1 - decay**self.count)
        spread = (self.second / (1 - square_decay**self.count)).sqrt() + epsilon
        # Gradients per cell are small beyond measure; only a zero one may fall below this.
        return mean / spread.clamp_min(torch.finfo(gradient.dtype).tiny)


def gradient_of(objective: Float[Tensor, ""], variable: Float[Tensor, "..."]) -> Tensor:
    """Return the objective's gradient, and leave none behind where weights ask for them.

    It is scaled up on its way back, because in a float16 network much of it, less than 6e-8 at a
    place of the latent or of an attention matrix, would be zero.

    Args:
        objective: what came of the variable.
        variable: float32.

    Raises:
        FloatingPointError: it is not finite.
    """
    (scaled,) = torch.autograd.grad(objective * _SCALE, variable)
    if not torch.isfinite(scaled).all():
        message = "the gradient is not finite; a float16 model overflows, load it in bfloat16"
        raise FloatingPointError(message)
    return scaled / _SCALE


def normalised_direction(
    gradient: Float[Tensor, "r k h w"], clip: float, *, centre: bool = True
) -> Float[Tensor, "r k h w"]:
    """Return each map's gradient in units of its standard deviation, clipped.

    Args:
        gradient: one map a mask.
        clip: at how many standard deviations.
        centre: take the mean off before.
    """
    if centre:
        gradient = gradient - gradient.mean((-2, -1), keepdim=True)
    spread = gradient.std((-2, -1), correction=0, keepdim=True)
    return (gradient / spread.clamp_min(torch.finfo(gradient.dtype).tiny)).clamp(-clip, clip)
