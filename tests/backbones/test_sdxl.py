"""SDXL on tiny real components, against diffusers' own pipeline and scheduler."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones.passes import first_pass
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor

from g4seg_pl.backbones.attention import attention_layers
from g4seg_pl.backbones.loading import load_components
from g4seg_pl.backbones.pretrained import load_generator
from g4seg_pl.backbones.sdxl import StableDiffusionXL
from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.diffusion import predict_clean
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.grounding import Grounding
from g4seg_pl.core.injection import Injection
from g4seg_pl.core.protocols import Generator
from g4seg_pl.core.steps import Correspondence
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import ConfigurationError

PROMPT = "A photo of dog"

# diffusers' Euler scheduler makes a NumPy array of a tensor in a way NumPy 2 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def generator(sdxl_folder: Path) -> StableDiffusion:
    return load_generator(str(sdxl_folder))


@pytest.fixture(scope="module")
def pipeline(sdxl_folder: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)


@pytest.fixture
def noisy() -> Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def broken_folder(sdxl_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; its weights are no weights."""
    folder = tmp_path / "model"
    shutil.copytree(sdxl_folder, folder)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"not weights: reading them fails")
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def injection_of(generator: StableDiffusion, weight: float, **options: Any) -> Injection:
    masks = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    tokens = generator.token_mask(PROMPT, "dog").expand(2, 1, -1).to(masks)
    return Injection(masks, tokens, weight, **options)


def test_the_folder_says_that_it_is_sdxl(generator: StableDiffusion) -> None:
    assert isinstance(generator, StableDiffusionXL)
    assert isinstance(generator, Generator)
    assert generator.image_size == 64
    assert not any(weight.requires_grad for weight in generator.parameters())
    assert not any(module.training for module in generator.modules())


def test_one_pass_is_the_pipelines_own(
    generator: StableDiffusion, pipeline: StableDiffusionXLPipeline
) -> None:
    call = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 1.0}
    theirs = first_pass(pipeline, pipeline.unet, **call)
    with torch.no_grad():
        embeddings = generator.embed([PROMPT])
        told = generator.conditions(theirs.sample, embeddings)
        output = generator.denoise(theirs.sample, theirs.timestep, embeddings)
    torch.testing.assert_close(told.text, theirs.told["encoder_hidden_states"])
    assert told.added is not None
    for name, value in theirs.told["added_cond_kwargs"].items():
        torch.testing.assert_close(told.added[name], value)
    torch.testing.assert_close(output, theirs.output)


def test_size_and_pooled_text_reach_the_unet(generator: StableDiffusion, noisy: Tensor) -> None:
    with torch.no_grad():
        embeddings = generator.embed([PROMPT] * 2)
        other = embeddings.clone()
        other[:, -1] += 1
        plain = generator.denoise(noisy, 400, embeddings)
        assert (generator.denoise(noisy, 400, other) - plain).abs().max() > 1e-6
        told = generator.conditions(noisy[..., :10], embeddings)
    assert told.added is not None
    assert told.added["time_ids"].tolist() == [[64, 40, 0, 0, 64, 40]] * 2


def test_sizes_stay_exact_with_a_model_in_16_bits(sdxl_folder: Path) -> None:
    half = load_generator(str(sdxl_folder), torch.bfloat16)
    with torch.no_grad():
        told = half.conditions(torch.zeros(1, 4, 257, 16), half.embed([PROMPT]))
    assert told.added is not None
    # bfloat16 knows 1024 and 1032 only.
    assert told.added["time_ids"].tolist() == [[1028, 64, 0, 0, 1028, 64]]


def test_guidance_compares_with_what_the_pipeline_takes_for_no_prompt(
    generator: StableDiffusion, pipeline: StableDiffusionXLPipeline
) -> None:
    _, negative, _, negative_pooled = pipeline.encode_prompt(
        PROMPT, device=torch.device("cpu"), do_classifier_free_guidance=True
    )
    with torch.no_grad():
        told = generator.conditions(torch.zeros(1, 4, 16, 16), generator.embed([""]))
    assert told.added is not None
    torch.testing.assert_close(told.text, negative)
    torch.testing.assert_close(told.added["text_embeds"], negative_pooled)


def test_a_model_that_reads_the_empty_prompt_gets_it_encoded(
    sdxl_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sdxl_folder, folder)
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    expected, _, pooled, _ = pipeline.encode_prompt(
        "", device=torch.device("cpu"), do_classifier_free_guidance=False
    )
    with torch.no_grad():
        found = load_generator(str(folder)).embed([""])
    torch.testing.assert_close(found[:, :-1], expected)
    torch.testing.assert_close(found[:, -1, : pooled.shape[1]], pooled)
    assert expected.abs().max() > 0


def test_an_embedding_does_not_depend_on_the_batch_it_was_made_in(
    generator: StableDiffusion,
) -> None:
    prompts = [PROMPT, "A photo of cat", ""]
    with torch.no_grad():
        together = generator.embed(prompts)
        alone = torch.cat([generator.embed([prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone)
    assert (together[0, -1] - together[1, -1]).abs().max() > 1e-6


def test_the_clean_latent_is_the_schedulers(sdxl_folder: Path, noisy: Tensor) -> None:
    generator = load_generator(str(sdxl_folder), torch.float64)
    noisy = noisy.double()
    with torch.no_grad():
        output = generator.denoise(noisy, 400, generator.embed([PROMPT] * 2))
    alphas, kind = generator.alphas_cumprod, generator.prediction_type
    found = predict_clean(noisy, output, alphas, 400, kind)
    # Euler's latent is z_t / √ᾱ_t, and its step is counted from the noise's share.
    scheduler = EulerDiscreteScheduler.from_pretrained(sdxl_folder, subfolder="scheduler")
    scheduler.set_timesteps(timesteps=[400])
    scaled = noisy / float(alphas[400]) ** 0.5
    step = scheduler.step(output, scheduler.timesteps[0], scaled)
    torch.testing.assert_close(found, step.pred_original_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 10.0])
def test_weight_zero_is_the_untouched_unet(
    generator: StableDiffusion, noisy: Tensor, weight: float
) -> None:
    with torch.no_grad():
        embeddings = generator.embed([PROMPT] * 2)
        plain = generator.denoise(noisy, 400, embeddings)
        found = generator.denoise(noisy, 400, embeddings, injection_of(generator, weight))
    assert torch.equal(found, plain) == (weight == 0)


def explicit_scores(query: Tensor, key: Tensor, added: Tensor) -> Tensor:
    """Eq. 5 written out, the matrix A formed."""
    size = query.shape[-1]
    return ((query @ key.transpose(-1, -2) + added[:, None]) * size**-0.5).softmax(-1)


@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_every_attention_layer_follows_equation_5(
    generator: StableDiffusion, noisy: Tensor, kind: str
) -> None:
    """Each layer's output under injection is that of the explicit formula on the same input."""
    names = {"attn1": "self_attention", "attn2": "cross_attention"}
    only = {name: name == names[kind] for name in names.values()}
    injection = injection_of(generator, 7.0, **only)
    calls: dict[str, tuple[Tensor, Tensor | None, Tensor]] = {}
    layers = {name: each for name, each in attention_layers(generator.unet) if kind in name}
    handles = [
        layer.register_forward_hook(
            lambda _, given, told, output, name=name: calls.update(
                {name: (given[0], told["encoder_hidden_states"], output)}
            ),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        generator.denoise(noisy, 400, generator.embed([PROMPT] * 2), injection)
    for handle in handles:
        handle.remove()
    assert set(calls) == set(layers)
    # 2 blocks down, 1 in the middle, 3 up; the lowest resolution has two layers a block.
    assert len(layers) == 1 + 2 + 2 + 2 * 2 + 2 * 1
    for name, (hidden, text, output) in calls.items():
        layer = layers[name]
        source = hidden if text is None else text
        query, key, value = (
            each.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for each in (layer.to_q(hidden), layer.to_k(source), layer.to_v(source))
        )
        side = round(hidden.shape[1] ** 0.5)
        rows = injection.on_grid((side, side))
        columns = rows if text is None else injection.tokens[..., :77]
        scores = explicit_scores(query, key, 7.0 * rows.mT @ columns)
        expected = layer.to_out[0]((scores @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "positions"),
    [("dog", [4]), ("cat", [6]), ("zebra", [4, 5, 6, 7, 8])],
)
def test_tokens_are_those_of_either_tokenizer(
    generator: StableDiffusion, name: str, positions: list[int]
) -> None:
    """The second tokenizer spells "zebra" in five letters; to the first it is one word."""
    prompt = "A photo of zebra" if name == "zebra" else "A photo of dog and cat"
    mask = generator.token_mask(prompt, name)
    assert len(mask) == generator.embed([prompt]).shape[1]
    assert mask.nonzero().flatten().tolist() == positions


def test_recorded_self_attention_has_every_layer(generator: StableDiffusion) -> None:
    with torch.no_grad():
        records = generator.self_attention(torch.randn(1, 4, 10, 14), 100, generator.embed([""]))
    own = [name for name, _ in attention_layers(generator.unet) if name.endswith("attn1")]
    assert sorted(record.layer for record in records) == sorted(own)
    assert {record.grid for record in records} == {(5, 7), (3, 4)}


def test_masks_are_grounded_in_the_word(
    generator: StableDiffusion, context: RefinementContext
) -> None:
    masks = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(4))
    words = Grounding(mixing=1.0)(masks, context)
    assert words.amin((1, 2)).tolist() == [0, 0, 0]
    assert torch.allclose(words.amax((1, 2)), torch.ones(3))
    found = Grounding(mixing=0.25)(masks, context)
    torch.testing.assert_close(found, 0.75 * masks + 0.25 * words, rtol=0, atol=1e-5)


@pytest.fixture
def context(generator: StableDiffusion) -> RefinementContext:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return RefinementContext(
        images=images,
        image_ids=("one", "two"),
        class_names=("dog", "cat", "dog"),
        owner=torch.tensor([0, 0, 1]),
        generator=generator,
        features=lambda pictures: torch.nn.functional.pixel_unshuffle(pictures, 8),
        masks_per_pass=2,
    )


@pytest.fixture
def masks() -> Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(4))


def test_the_papers_update_and_the_prompt_cache_know_nothing_of_it(
    context: RefinementContext, masks: Tensor
) -> None:
    step = Correspondence(guidance_scale=3.0, confidence_range=None)
    refined = step(masks, context)
    assert refined.shape == masks.shape
    assert set(context.prompt_embeddings) == {PROMPT, "A photo of cat", ""}
    torch.testing.assert_close(step(masks, context), refined)


def test_the_other_signals_of_a_generator_run_on_it(
    context: RefinementContext, masks: Tensor
) -> None:
    """Its finest attention is at half the latent's side; one descent is one, recomputed or not."""
    refined = Affinity()(masks, context)
    assert (refined - masks).abs().max() > 1e-3
    kept = Gradient(iterations=1, checkpointing=False)(masks, context)
    torch.testing.assert_close(Gradient(iterations=1, checkpointing=True)(masks, context), kept)
    assert (kept - masks).abs().max() > 1e-3


def test_the_two_line_object_loads_it(sdxl_folder: Path) -> None:
    refiner = G4SegRefiner.from_pretrained(str(sdxl_folder), device="cpu")
    assert isinstance(refiner.generator, StableDiffusionXL)
    image = torch.rand(3, 30, 40)
    assert refiner.refine(image, {"dog": torch.rand(30, 40)})["dog"].shape == (30, 40)


@pytest.mark.parametrize(
    ("dtype", "forced", "expected"),
    [
        (torch.float16, True, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_the_autoencoder_stays_out_of_float16_where_it_overflows(
    sdxl_folder: Path, tmp_path: Path, dtype: torch.dtype, forced: bool, expected: torch.dtype
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sdxl_folder, folder)
    edit(folder / "vae" / "config.json", force_upcast=forced)
    parts = load_components(str(folder), dtype)
    assert {weight.dtype for weight in parts.vae.parameters()} == {expected}
    assert {weight.dtype for weight in parts.unet.parameters()} == {dtype}
    if forced:
        generator = StableDiffusionXL(parts)
        with torch.no_grad():
            latents = generator.encode(torch.rand(1, 3, 64, 64))
            output = generator.denoise(latents, 400, generator.embed([PROMPT]))
        assert (latents.dtype, output.dtype) == (torch.float32, torch.float32)
        assert torch.isfinite(output).all()


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2", "text_encoder"])
def test_a_missing_part_is_named(broken_folder: Path, part: str) -> None:
    shutil.rmtree(broken_folder / part)
    with pytest.raises(ConfigurationError, match=rf"\(a Stable.*no {part}/.*whole diffusers SDXL"):
        load_generator(str(broken_folder))


def test_sdxls_refiner_is_refused_before_weights_load(broken_folder: Path) -> None:
    edit(broken_folder / "unet" / "config.json", projection_class_embeddings_input_dim=5 * 8 + 12)
    with pytest.raises(ConfigurationError, match=r"is 52, not 60.*give a base model of SDXL"):
        load_generator(str(broken_folder))


def test_a_schedule_without_betas_is_refused(broken_folder: Path) -> None:
    file = broken_folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "EDMEulerScheduler", "sigma_max": 80.0}))
    with pytest.raises(ConfigurationError, match=r"no beta_start and beta_end.*EDMEulerScheduler"):
        load_generator(str(broken_folder))


def test_the_wrong_class_for_a_folder_is_refused(sdxl_folder: Path, sd1_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="it is SDXL, which does not serve here"):
        StableDiffusion.from_pretrained(str(sdxl_folder))
    with pytest.raises(ConfigurationError, match="it is Stable Diffusion"):
        StableDiffusionXL.from_pretrained(str(sd1_folder))
