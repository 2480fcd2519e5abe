"""Named sequences of update steps: the paper's method, and the best one found past it."""

from typing import Literal

from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.steps import Correspondence, UpdateStep

Recipe = Literal["best", "paper"]


def steps_of(recipe: Recipe) -> tuple[UpdateStep, ...]:
    """Return the update steps of a named recipe.

    ``paper`` is the paper's update (Eq. 2-9) with the figures it prints for weakly supervised
    seeds. ``best`` is what gained most on the validation scenes of the embedded world
    (configs/refine/best.yaml has the same steps; docs/signals.md says what carries over to Stable
    Diffusion and what cannot be known there).

    Raises:
        ValueError: there is no such recipe.
    """
    match recipe:
        case "paper":
            return (Correspondence(),)
        case "best":
            return (Affinity(), Gradient())
    message = f"recipe is {recipe!r}; give 'best' or 'paper'"
    raise ValueError(message)
