"""How far each pixel of a refined mask can be trusted, without any ground truth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.steps import NestedStep, any_needs_gradient

# Draws of one repetition must not meet those of the next.
_DRAWS_APART = 10_000


@dataclass(frozen=True)
class Averaged:
    """The mean of the same steps under several draws of noise, with its confidence.

    Attributes:
        steps: applied in order, from the same masks each time.
        draws: how often.
        spread_over: what the confidence is taken over: the results of the draws, or all masks on
            the way, the masks given included.
    """

    steps: list[NestedStep]
    draws: int = 4
    spread_over: Literal["draws", "steps"] = "draws"

    def __post_init__(self) -> None:
        """Refuse what has no mean."""
        if self.draws < 1 or not self.steps:
            message = f"draws is {self.draws} and steps {self.steps}; give at least one of each"
            raise ValueError(message)

    @property
    def needs_gradient(self) -> bool:
        """Whether any of the steps does."""
        return any_needs_gradient(self.steps)

    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return the mean over draws; the context keeps ``confidence``."""
        seen, results = [foreground], []
        for draw in range(self.draws):
            changed = context.variant(first_draw=context.first_draw + draw * _DRAWS_APART)
            masks = foreground
            for step in self.steps:
                masks = step(masks, changed)
                seen.append(masks)
            results.append(masks)
        spread = results if self.spread_over == "draws" else seen
        context.keep("confidence", confidence(spread))
        return torch.stack(results).mean(0)


def confidence(masks: Sequence[Float[Tensor, "m H W"]]) -> Float[Tensor, "m H W"]:
    """Return 1 - 2σ, σ the standard deviation of each pixel over several masks in [0, 1].

    1 where all agree, 0 where half of them say 0 and half 1.

    Args:
        masks: the same masks under several draws of noise, or at several steps.
    """
    return (1 - 2 * torch.stack(list(masks)).std(0, correction=0)).clamp(0, 1)
