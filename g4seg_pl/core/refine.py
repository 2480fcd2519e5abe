"""The algorithm on one page: masks go through update steps, one after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.steps import UpdateStep


@dataclass(frozen=True)
class RefinementState:
    """What one step did, for inspection.

    Attributes:
        index: the step's place in the sequence, from 0.
        step: the step itself.
        before: ``(m, H, W)``, the masks it was given.
        after: ``(m, H, W)``, the masks it returned.
        artifacts: by-products by name, one row a mask; ``generated`` is x̃₀, ``(m, 3, H, W)`` in
            [-1, 1], where the step generates an image; ``neighbours`` is δ, ``(m, h, w)``, where
            it matches images, flat places on the same grid.
    """

    index: int
    step: UpdateStep
    before: Float[Tensor, "m H W"]
    after: Float[Tensor, "m H W"]
    artifacts: Mapping[str, Tensor]


def refine(
    foreground: Float[Tensor, "m H W"],
    context: RefinementContext,
    steps: Sequence[UpdateStep],
    callback: Callable[[RefinementState], None] | None = None,
) -> Float[Tensor, "m H W"]:
    """Return the masks after every step.

    Args:
        foreground: S of all masks of the context's images, in [0, 1], in the order of
            ``context.class_names``.
        context: the images, the generator and what is cached about them.
        steps: applied in order; the paper's method is one ``Correspondence``.
        callback: sees the state after every step.

    Raises:
        ValueError: the masks are not those the context describes.
        FloatingPointError: a step returned a value that is not finite.
    """
    if len(foreground) != len(context.class_names):
        message = f"{len(foreground)} masks for {len(context.class_names)} class_names"
        raise ValueError(message)
    if not len(foreground):
        return foreground
    for index, step in enumerate(steps):
        before = foreground
        context.start_recording(enabled=callback is not None)
        foreground = step(before, context)
        if not torch.isfinite(foreground).all():
            message = f"step {index} ({step}) returned a mask that is not finite"
            raise FloatingPointError(message)
        if callback is not None:
            callback(RefinementState(index, step, before, foreground, context.recorded))
    return foreground
