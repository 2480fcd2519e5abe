"""DDIM both ways and null-text inversion against diffusers' schedulers and plain generation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.ddim import ddim_invert, ddim_move, ddim_path
from g4seg_pl.core.generation import rows_per_class
from g4seg_pl.core.null_text import (
    Guided,
    NullTextCorrespondence,
    NullTextFit,
    fit_null_embeddings,
    regenerate,
)
from g4seg_pl.core.refine import RefinementState, refine

SceneMaker = Callable[..., RefinementContext]
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
QUICK = NullTextCorrespondence(ddim_steps=3, inner_steps=2, confidence_range=None)


@pytest.mark.parametrize("steps", [1, 7, 50, 999])
def test_path_is_the_schedulers(steps: int) -> None:
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    path = ddim_path(scheduler.alphas_cumprod, steps)
    wanted = scheduler.timesteps.flip(0).tolist()
    assert list(path.timesteps) == wanted
    assert path.alphas[0] == pytest.approx(float(scheduler.final_alpha_cumprod))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_step_down_is_the_schedulers(kind: Any) -> None:
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=kind)
    scheduler.set_timesteps(20)
    path = ddim_path(scheduler.alphas_cumprod, 20)
    for level, timestep in enumerate(path.timesteps, 1):
        latent, output = torch.randn(2, 2, 4, 6, 8).unbind()
        found = ddim_move(latent, output, path.alphas[level], path.alphas[level - 1], kind)
        expected = scheduler.step(output, timestep, latent).prev_sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_a_step_up_is_undone_by_a_step_down_of_the_same_output(kind: Any) -> None:
    path = ddim_path(DDIMScheduler(**SCHEDULE).alphas_cumprod, 10)
    latent, output = torch.randn(2, 2, 4, 6, 8, dtype=torch.float64).unbind()
    levels = ddim_invert(latent, replace_last(path, 1), lambda *_: output, kind)
    back = ddim_move(levels[1], output, path.alphas[1], path.alphas[0], kind)
    torch.testing.assert_close(back, latent)


def replace_last(path: Any, count: int) -> Any:
    """The first steps of a path."""
    return replace(path, timesteps=path.timesteps[:count], alphas=path.alphas[: count + 1])


@pytest.mark.parametrize("folder", ["sd1_folder", "sd2_folder"])
def test_a_step_up_and_a_step_down_of_the_network_nearly_cancel(
    folder: str, request: pytest.FixtureRequest
) -> None:
    generator = StableDiffusion.from_pretrained(str(request.getfixturevalue(folder)))
    kind = generator.prediction_type
    path = ddim_path(generator.alphas_cumprod, 50)
    latent, text = torch.randn(1, 4, 16, 16), generator.embed(["A photo of dog"])
    with torch.no_grad():
        levels = ddim_invert(latent, path, lambda z, t: generator.denoise(z, t, text), kind)
        for level in (1, 10, 25):
            output = generator.denoise(levels[level], path.timesteps[level - 1], text)
            here, below = path.alphas[level], path.alphas[level - 1]
            back = ddim_move(levels[level], output, here, below, kind)
            moved = (levels[level] - levels[level - 1]).square().mean()
            assert (back - levels[level - 1]).square().mean() < 0.02 * moved


@pytest.fixture
def inverted(scene: SceneMaker, counted: Any, soft_masks: Tensor) -> Any:
    """Levels, path, guided network and the prompt "" of two masks."""
    context = scene((0, 3))
    rows = rows_per_class(soft_masks[[0, 3]], context)
    path = ddim_path(counted.alphas_cumprod, 5)
    with torch.no_grad():
        levels = NullTextCorrespondence().inverted(rows, context, path)
    prompts, nothing = context.embed(rows.prompts), context.embed(("", ""))
    guided = Guided(
        lambda latent, t: counted.denoise(latent, t, prompts),
        lambda latent, t, text: counted.denoise(latent, t, text),
        7.5,
        counted.prediction_type,
    )
    return levels, path, guided, nothing


def generate(inverted: Any, fit: NullTextFit) -> Tensor:
    levels, path, guided, nothing = inverted
    with torch.no_grad():
        embeddings = fit_null_embeddings(levels, path, guided, nothing, fit)
        return regenerate(levels[-1], path, guided, embeddings)


def test_without_inner_steps_it_is_plain_ddim_of_diffusers(inverted: Any, counted: Any) -> None:
    levels, _, guided, nothing = inverted
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(5)
    latent = levels[-1]
    with torch.no_grad():
        for timestep in scheduler.timesteps.tolist():
            told = guided.conditional(latent, timestep)
            untold = counted.denoise(latent, timestep, nothing)
            output = untold + 7.5 * (told - untold)
            latent = scheduler.step(output, timestep, latent).prev_sample
    found = generate(inverted, NullTextFit(inner_steps=0))
    torch.testing.assert_close(found, latent, rtol=1e-4, atol=1e-4)


def test_fitted_embeddings_give_the_image_back_better_than_plain_guidance(inverted: Any) -> None:
    clean = inverted[0][0]
    strict = NullTextFit(inner_steps=10, stop_below=0.0, stop_growth=0.0)
    errors = [
        (generate(inverted, fit) - clean).square().flatten(1).mean(1)
        for fit in (NullTextFit(inner_steps=0), NullTextFit(inner_steps=1), strict)
    ]
    assert (errors[1] < errors[0]).all()
    # Random weights hardly hear any embedding: a fifth of the error is all it can take off.
    assert (errors[2] < errors[1]).all()
    assert (errors[2] < 0.85 * errors[0]).all()


def test_a_row_stops_by_itself(inverted: Any) -> None:
    levels, path, guided, nothing = inverted
    plain = NullTextFit(inner_steps=3, stop_below=0.0, stop_growth=0.0)
    with torch.no_grad():
        never = fit_null_embeddings(levels, path, guided, nothing, plain, 1)[0]
        once = fit_null_embeddings(levels, path, guided, nothing, replace(plain, inner_steps=1), 1)
        at_once = fit_null_embeddings(
            levels, path, guided, nothing, replace(plain, stop_below=1e9), 1
        )
        # One row alone is where it wants to be already: it moves once, the other three times.
        told = guided.conditional(levels[-1], path.timesteps[-1])
        untold = guided.unconditional(levels[-1], path.timesteps[-1], nothing)
        output = guided.combine(told, untold)
        reached = ddim_move(levels[-1], output, *path.alphas[:-3:-1], guided.prediction_type)
        easy = levels.clone()
        easy[-2, 0] = reached[0]
        mixed = fit_null_embeddings(
            easy, path, guided, nothing, replace(plain, stop_below=1e-12), 1
        )[0]
    torch.testing.assert_close(at_once[0], once[0])
    torch.testing.assert_close(mixed[1], never[1])
    assert (mixed[0] - nothing[0]).abs().max() <= 0.0101


def test_a_mask_does_not_depend_on_the_batch_it_is_in(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    together = refine(soft_masks, scene(), [QUICK])
    in_parts = refine(soft_masks, scene(masks_per_pass=1), [QUICK])
    # Adam's first steps have the size of the rate whatever the gradient's: tiny ones may differ.
    torch.testing.assert_close(in_parts, together, rtol=0, atol=1e-2)
    assert (in_parts - together).abs().mean() < 1e-3


def test_inference_mode_makes_no_difference(scene: SceneMaker, soft_masks: Tensor) -> None:
    expected = refine(soft_masks[:2], scene((0, 1)), [QUICK])
    with torch.inference_mode():
        masks = soft_masks[:2].clone()
        context: RefinementContext = scene((0, 1))
        context.images = context.images.clone()
        found = refine(masks, context, [QUICK])
    torch.testing.assert_close(found, expected)
    assert QUICK.needs_gradient


@pytest.mark.parametrize(
    "options",
    [
        {"regeneration": "single", "timestep": 400},
        {"inversion_prompt": "empty"},
        {"fit_injected": True},
        {"all_classes_at_once": True},
        {"matching": "aligned"},
        {"injection_weight": 0.0},
    ],
)
def test_readings_run_and_differ(
    options: dict[str, Any], scene: SceneMaker, soft_masks: Tensor
) -> None:
    seen: list[RefinementState] = []
    for step in (QUICK, replace(QUICK, **options)):
        refined = refine(soft_masks, scene(), [step], seen.append)
        assert refined.min() >= 0
        assert refined.max() <= 1
    first, second = (state.artifacts["generated"] for state in seen)
    assert torch.equal(first, second) == (options == {"matching": "aligned"})
    assert not torch.equal(seen[0].after, seen[1].after)


def test_checkpointing_changes_nothing_but_memory(scene: SceneMaker, soft_masks: Tensor) -> None:
    plain = refine(soft_masks[:1], scene((0,)), [QUICK])
    again = refine(soft_masks[:1], scene((0,)), [replace(QUICK, checkpointing=True)])
    torch.testing.assert_close(again, plain)


def test_how_far_the_image_is_inverted(scene: SceneMaker, soft_masks: Tensor, counted: Any) -> None:
    alphas = counted.alphas_cumprod
    assert len(ddim_path(alphas, 50)) == 50
    assert ddim_path(alphas, 50, 400).timesteps[-1] == 381
    assert ddim_path(alphas, 50, 401).timesteps[-1] == 401
    refine(soft_masks[:1], scene((0,)), [replace(QUICK, ddim_steps=10, timestep=400)])
    # 4 invert; each of 4 fits takes 1 + 2, and 3 lead to the next; 4 of 2 passes each generate.
    assert counted.rows == 4 + 4 * (1 + 2) + 3 + 4 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ddim_steps": 0}, "ddim_steps is 0"),
        ({"inner_steps": -1}, "inner_steps is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"beta": 2.0}, "beta is 2.0"),
    ],
)
def test_values_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NullTextCorrespondence(**options)


def test_steps_that_do_not_fit_the_schedule_are_refused(sd1_folder: Path) -> None:
    alphas = StableDiffusion.from_pretrained(str(sd1_folder)).alphas_cumprod
    with pytest.raises(ValueError, match="ddim_steps is 1000"):
        ddim_path(alphas, 1000)
    with pytest.raises(ValueError, match="timestep is 0"):
        ddim_path(alphas, 50, 0)
