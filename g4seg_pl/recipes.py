"""Named sequences of update steps: the paper's method, and the best one found past it."""

from collections.abc import Sequence
from typing import Literal

from g4seg_pl.core.controls import ColourAffinity, EdgeFilter
from g4seg_pl.core.grounding import Grounding
from g4seg_pl.core.steps import Correspondence, UpdateStep
from g4seg_pl.types import ConfigurationError

Recipe = Literal["best", "paper"]


def as_steps(steps: Sequence[UpdateStep]) -> tuple[UpdateStep, ...]:
    """Return update steps as a tuple.

    Raises:
        ConfigurationError: they are a text, of which each letter would be a step.
    """
    if isinstance(steps, str):
        message = (
            f"steps is the text {steps!r}; give a list of update steps, or of a recipe "
            f"g4seg_pl.recipes.steps_of({steps!r}), G4SegRefiner.from_pretrained(recipe={steps!r})"
        )
        raise ConfigurationError(message)
    return tuple(steps)


def steps_of(recipe: Recipe) -> tuple[UpdateStep, ...]:
    """Return the update steps of a named recipe, for images of about 512 pixels.

    ``paper`` is the paper's update (Eq. 2-9) with the figures it prints for weakly supervised
    seeds. ``best`` is the sequence that gained most on the validation scenes of the embedded
    world: along the image's edges, half-way to where the generator attends to the class's word,
    along colours (configs/refine/best.yaml has the same steps; docs/signals.md says what carries
    over to Stable Diffusion and what cannot be known there). Its timestep is the one at which
    DiffSegmenter reads Stable Diffusion's attention, in one draw of noise; the scenes' own is 50,
    in three.

    Raises:
        ValueError: there is no such recipe.
    """
    match recipe:
        case "paper":
            return (Correspondence(),)
        case "best":
            return (
                # One and a half cells of a seed of 32 x 32, as chosen on the scenes' 8 x 8.
                EdgeFilter(kind="guided", radius=24, epsilon=1e-4),
                Grounding(mixing=0.5, timestep=100, upsampling="joint_bilateral"),
                ColourAffinity(
                    mixing=0.5,
                    size=64,
                    sigma_colour=0.05,
                    sigma_position=0.2,
                    norm="range",
                    upsampling="joint_bilateral",
                ),
            )
    message = f"recipe is {recipe!r}; give 'best' or 'paper'"
    raise ValueError(message)
