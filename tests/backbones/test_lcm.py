"""Latent consistency models with the layout of Stable Diffusion 1.x, against diffusers' own."""

from pathlib import Path

import pytest
import torch
from backbones.passes import first_pass
from diffusers import LatentConsistencyModelPipeline, LCMScheduler

from g4seg_pl.backbones.guidance import guidance_embedding
from g4seg_pl.backbones.pretrained import load_generator
from g4seg_pl.core.diffusion import predict_clean
from g4seg_pl.types import ConfigurationError

PROMPT = "A photo of dog"


@pytest.fixture(scope="module")
def pipeline(lcm_folder: Path) -> LatentConsistencyModelPipeline:
    return LatentConsistencyModelPipeline.from_pretrained(lcm_folder)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 7.5])
@pytest.mark.parametrize("size", [10, 11, 256])
def test_embedding_of_guidance_is_diffusers_own(
    pipeline: LatentConsistencyModelPipeline, guidance: float, size: int
) -> None:
    expected = pipeline.get_guidance_scale_embedding(torch.tensor([guidance]), size)
    torch.testing.assert_close(guidance_embedding(guidance, size), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_one_pass_is_the_pipelines_own(
    lcm_folder: Path, pipeline: LatentConsistencyModelPipeline, guidance: float
) -> None:
    """Diffusers' guidance scale 1 is w = 0, the default here."""
    scale = guidance + 1
    call = {"prompt": PROMPT, "num_inference_steps": 1, "guidance_scale": scale}
    theirs = first_pass(pipeline, pipeline.unet, **call)
    generator = load_generator(str(lcm_folder), embedded_guidance=guidance)
    with torch.no_grad():
        embeddings = generator.embed([PROMPT])
        output = generator.denoise(theirs.sample, theirs.timestep, embeddings)
    torch.testing.assert_close(output, theirs.output, rtol=1e-4, atol=1e-5)


def test_guidance_reaches_the_unet(lcm_folder: Path) -> None:
    noisy = torch.randn(2, 4, 16, 16)
    outputs = []
    for guidance in (0.0, 7.5):
        generator = load_generator(str(lcm_folder), embedded_guidance=guidance)
        with torch.no_grad():
            outputs.append(generator.denoise(noisy, 400, generator.embed([PROMPT] * 2)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6


def test_the_clean_latent_is_the_consistency_functions(lcm_folder: Path) -> None:
    """At t = 399 the model's own boundary terms are 1 and 0 but for 1e-7."""
    generator = load_generator(str(lcm_folder))
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = generator.denoise(noisy, 399, generator.embed([PROMPT]))
    alphas, kind = generator.alphas_cumprod, generator.prediction_type
    found = predict_clean(noisy, output, alphas, 399, kind)
    scheduler = LCMScheduler.from_pretrained(lcm_folder, subfolder="scheduler")
    scheduler.set_timesteps(timesteps=[399])
    step = scheduler.step(output, 399, noisy)
    torch.testing.assert_close(found, step.denoised, rtol=1e-4, atol=1e-4)


def test_guidance_for_a_model_without_a_place_for_it_is_refused(sd1_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"embedded_guidance is 2.0.*only LCMs"):
        load_generator(str(sd1_folder), embedded_guidance=2.0)
