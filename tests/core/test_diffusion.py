"""One-step noising and reconstruction against diffusers' own schedulers."""

import inspect

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from g4seg_pl.core.diffusion import add_noise, predict_clean, seeded_noise

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep", [1, 400, 999])
def test_clean_latent_is_the_schedulers_pred_original_sample(
    prediction_type: str, timestep: int
) -> None:
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    noisy, output = torch.randn(2, 2, 4, 8, 6).unbind()
    expected = scheduler.step(output, timestep, noisy).pred_original_sample
    clean = predict_clean(noisy, output, scheduler.alphas_cumprod, timestep, prediction_type)
    torch.testing.assert_close(clean, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timestep", [0, 400, 999])
def test_noising_is_the_schedulers(timestep: int) -> None:
    scheduler = DDPMScheduler(**SCHEDULE)
    clean, noise = torch.randn(2, 2, 4, 8, 6).unbind()
    expected = scheduler.add_noise(clean, noise, torch.tensor([timestep, timestep]))
    noisy = add_noise(clean, noise, scheduler.alphas_cumprod, timestep)
    torch.testing.assert_close(noisy, expected)


@given(timestep=st.integers(0, 999), seed=st.integers(0, 1000))
def test_true_noise_and_velocity_give_the_clean_latent_back(timestep: int, seed: int) -> None:
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod.double()
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 1, 4, 3, 5, generator=generator, dtype=torch.float64).unbind()
    noisy = add_noise(clean, noise, alphas, timestep)
    velocity = alphas[timestep].sqrt() * noise - (1 - alphas[timestep]).sqrt() * clean
    from_noise = predict_clean(noisy, noise, alphas, timestep, "epsilon")
    from_velocity = predict_clean(noisy, velocity, alphas, timestep, "v_prediction")
    torch.testing.assert_close(from_noise, clean)
    torch.testing.assert_close(from_velocity, clean)


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_timestep_outside_the_schedule_is_refused(timestep: int) -> None:
    latent = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match=f"timestep is {timestep}; the schedule has 0 to 999"):
        add_noise(latent, latent, DDPMScheduler(**SCHEDULE).alphas_cumprod, timestep)


def test_noise_depends_on_each_of_its_keys_and_on_nothing_else() -> None:
    first = seeded_noise((4, 8, 8), 0, "2007_000032", "dog")
    torch.manual_seed(5)
    torch.testing.assert_close(
        seeded_noise((4, 8, 8), 0, "2007_000032", "dog"), first, rtol=0, atol=0
    )
    others = [
        seeded_noise((4, 8, 8), 1, "2007_000032", "dog"),
        seeded_noise((4, 8, 8), 0, "2007_000033", "dog"),
        seeded_noise((4, 8, 8), 0, "2007_000032", "cat"),
        seeded_noise((4, 8, 8), 0, "2007_000032", "dog", draw=1),
        # The border between the keys counts too.
        seeded_noise((4, 8, 8), 0, "2007_000032d", "og"),
    ]
    assert all((other - first).abs().max() > 0.1 for other in others)


def test_an_unknown_prediction_is_refused() -> None:
    latent = torch.zeros(1, 4, 2, 2)
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod
    # Without the checks of types, which only tests have.
    unchecked = inspect.unwrap(predict_clean)
    with pytest.raises(ValueError, match="prediction_type is 'flow_prediction'; this knows eps"):
        unchecked(latent, latent, alphas, 400, "flow_prediction")


def test_noise_does_not_depend_on_torchs_defaults() -> None:
    expected = seeded_noise((4, 8, 8), 0, "2007_000032", "dog")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = seeded_noise((4, 8, 8), 0, "2007_000032", "dog")
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_noise_leaves_the_global_generator_alone_and_is_standard_normal() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    noise = seeded_noise((100_000,), 7, "a", "b")
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02
