"""Named sequences of update steps: the paper's method, and the best one found past it."""

from typing import Literal

from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.controls import EdgeFilter
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.steps import Correspondence, UpdateStep

Recipe = Literal["best", "paper"]


def steps_of(recipe: Recipe) -> tuple[UpdateStep, ...]:
    """Return the update steps of a named recipe, for images of about 512 pixels.

    ``paper`` is the paper's update (Eq. 2-9) with the figures it prints for weakly supervised
    seeds. ``best`` is the sequence that gained most on the validation scenes of the embedded
    world: along the image's edges, down the denoising loss, along the generator's attention
    (configs/refine/best.yaml has the same steps; docs/signals.md says what carries over to Stable
    Diffusion and what cannot be known there).

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
                Gradient(timesteps=(500,), iterations=4, step_size=0.1),
                Affinity(
                    timestep=100,
                    power=2.0,
                    form="heads",
                    norm="range",
                    level_weights=(1.0, 1.0),
                    prompt="classes",
                    upsampling="joint_bilateral",
                    edge_radius=2,
                    edge_epsilon=3e-3,
                ),
            )
    message = f"recipe is {recipe!r}; give 'best' or 'paper'"
    raise ValueError(message)
