"""The generator on tiny models of both generations, against diffusers' own pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPTokenizer

from g4seg_pl.backbones.attention import RecordingProcessor, attention_layers, installed
from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.backbones.text import mark_tokens, tokenise
from g4seg_pl.core.injection import Injection
from g4seg_pl.core.protocols import AttentionRecord, Generator
from g4seg_pl.types import ConfigurationError


@pytest.fixture(scope="module", params=["sd1_folder", "sd2_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def generator(folder: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture
def noisy() -> Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def injection_of(
    generator: StableDiffusion, masks: Tensor, names: list[str], weight: float, **options: object
) -> Injection:
    prompt = "A photo of " + " and ".join(names)
    tokens = torch.stack([generator.token_mask(prompt, name) for name in names])
    return Injection(masks, tokens.expand(len(masks), -1, -1).to(masks), weight, **options)


def test_it_is_a_generator_with_the_models_own_numbers(
    generator: StableDiffusion, pipeline: StableDiffusionPipeline
) -> None:
    assert isinstance(generator, Generator)
    # From 3.12 on isinstance sees what the class has, not a buffer that __getattr__ finds.
    assert all(hasattr(StableDiffusion, name) for name in vars(Generator) if name[0] != "_")
    assert generator.image_size == 64
    assert generator.prediction_type == pipeline.scheduler.config.prediction_type
    torch.testing.assert_close(generator.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_weights_are_frozen_registered_and_in_evaluation_mode(generator: StableDiffusion) -> None:
    assert {name for name, _ in generator.named_children()} == {"unet", "vae", "text_encoder"}
    assert not any(weight.requires_grad for weight in generator.parameters())
    assert not any(module.training for module in generator.modules())


def test_embedding_is_the_pipelines(
    generator: StableDiffusion, pipeline: StableDiffusionPipeline
) -> None:
    prompts = ["A photo of dog", ""]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(generator.embed(prompts), expected)


def test_coding_is_the_autoencoders(
    generator: StableDiffusion, pipeline: StableDiffusionPipeline
) -> None:
    images, vae = torch.rand(2, 3, 64, 48) * 2 - 1, pipeline.vae
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        latents = generator.encode(images)
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
        decoded = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
        torch.testing.assert_close(generator.decode(latents), decoded, rtol=1e-4, atol=1e-5)


def test_latents_are_shifted_as_the_autoencoder_says(sd1_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd1_folder, tmp_path / "model")
    file = folder / "vae" / "config.json"
    changes = {"shift_factor": 0.25, "scaling_factor": 0.5}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    shifted = StableDiffusion.from_pretrained(str(folder))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        modes = shifted.vae.encode(images).latent_dist.mode()
        torch.testing.assert_close(shifted.encode(images), (modes - 0.25) * 0.5)
        decoded = shifted.vae.decode(modes).sample.clamp(-1, 1)
        torch.testing.assert_close(shifted.decode((modes - 0.25) * 0.5), decoded)


def test_autoencoder_takes_few_large_pictures_at_once(
    generator: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(5, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        latents = generator.encode(images)
        expected = generator.decode(latents)
        monkeypatch.setattr("g4seg_pl.core.layout._PIXELS", 2 * 64 * 48)
        taken: list[int] = []
        hooks = [
            part.register_forward_hook(lambda _, given, __: taken.append(len(given[0])))
            for part in (generator.vae.encoder, generator.vae.decoder)
        ]
        torch.testing.assert_close(generator.encode(images), latents, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(generator.decode(latents), expected, rtol=1e-4, atol=1e-5)
        assert taken == [2, 2, 1] * 2
        monkeypatch.setattr("g4seg_pl.core.layout._PIXELS", 1)  # a picture above the bound alone
        generator.encode(images[:2])
    assert taken[6:] == [1, 1]
    for hook in hooks:
        hook.remove()


def test_denoising_is_the_untouched_unet_bit_for_bit(
    generator: StableDiffusion, noisy: Tensor
) -> None:
    embeddings = generator.embed(["A photo of dog", "A photo of cat"])
    masks = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        laid_out = noisy.contiguous(memory_format=torch.channels_last)
        expected = generator.unet(laid_out, 400, embeddings).sample
        off = injection_of(generator, masks, ["dog"], 0.0)
        assert torch.equal(generator.denoise(noisy, 400, embeddings), expected)
        assert torch.equal(generator.denoise(noisy, 400, embeddings, off), expected)


def test_injection_changes_the_output_and_leaves_the_model_as_it_was(
    generator: StableDiffusion, noisy: Tensor
) -> None:
    embeddings = generator.embed(["A photo of dog"] * 2)
    before = {name: layer.processor for name, layer in attention_layers(generator.unet)}
    with torch.no_grad():
        plain = generator.denoise(noisy, 400, embeddings)
        on = injection_of(generator, torch.rand(2, 1, 64, 64), ["dog"], 10.0)
        assert (generator.denoise(noisy, 400, embeddings, on) - plain).abs().max() > 1e-6
        assert torch.equal(generator.denoise(noisy, 400, embeddings), plain)
    assert {n: layer.processor for n, layer in attention_layers(generator.unet)} == before


def test_an_unused_class_changes_nothing(generator: StableDiffusion, noisy: Tensor) -> None:
    embeddings = generator.embed(["A photo of dog and cat"] * 2)
    mask = torch.rand(2, 1, 64, 64)
    two = injection_of(generator, torch.cat([mask, 0 * mask], 1), ["dog", "cat"], 10.0)
    one = Injection(two.foreground[:, :1], two.tokens[:, :1], 10.0)
    with torch.no_grad():
        found = generator.denoise(noisy, 400, embeddings, two)
        expected = generator.denoise(noisy, 400, embeddings, one)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_gradient_of_the_loss_agrees_with_finite_differences(folder: Path) -> None:
    generator = StableDiffusion.from_pretrained(str(folder), torch.float64)
    draw = torch.Generator().manual_seed(1)
    noisy, noise = torch.randn(2, 1, 4, 16, 16, generator=draw, dtype=torch.float64).unbind()
    embeddings = generator.embed(["A photo of dog"])
    masks = torch.rand(1, 1, 64, 64, generator=draw, dtype=torch.float64)

    def loss(foreground: Tensor) -> Tensor:
        injection = injection_of(generator, foreground, ["dog"], 10.0, binarise_at=None)
        output = generator.denoise(noisy, 400, embeddings, injection)
        return (output - noise).square().mean()

    masks.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(masks), masks)
    # Along the gradient itself, so that a wrong gradient cannot hide in a small projection.
    direction, step = gradient / gradient.norm(), 1e-3
    with torch.no_grad():
        change = loss(masks + step * direction) - loss(masks - step * direction)
    numeric = float(change / (2 * step))
    assert abs(numeric - float(gradient.norm())) / abs(numeric) < 1e-4


def test_recorded_queries_and_keys_are_those_of_self_attention(
    generator: StableDiffusion,
) -> None:
    noisy = torch.randn(1, 4, 10, 14)
    embeddings = generator.embed([""])
    with torch.no_grad():
        records = generator.self_attention(noisy, 100, embeddings)
    own = [name for name, _ in attention_layers(generator.unet) if name.endswith("attn1")]
    assert sorted(record.layer for record in records) == sorted(own)
    assert {record.grid for record in records} == {(10, 14), (5, 7), (3, 4)}
    first, inputs = records[0], []
    layer = generator.unet.get_submodule(first.layer)
    handle = layer.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    with torch.no_grad():
        generator.denoise(noisy, 100, embeddings)
        handle.remove()
        expected = layer.get_attention_scores(
            layer.head_to_batch_dim(layer.to_q(inputs[0])),
            layer.head_to_batch_dim(layer.to_k(inputs[0])),
        )
    logits = first.scale * first.query @ first.key.transpose(-1, -2)
    torch.testing.assert_close(logits.softmax(-1).flatten(0, 1), expected, rtol=0, atol=1e-6)


def test_recorded_cross_attention_looks_at_the_prompt(generator: StableDiffusion) -> None:
    noisy, embeddings = torch.randn(1, 4, 10, 14), generator.embed(["A photo of dog"])
    with torch.no_grad():
        own, cross = generator.attention(noisy, 100, embeddings)
        alone = generator.self_attention(noisy, 100, embeddings)
    for ours, theirs in zip(own, alone, strict=True):
        assert ours.layer == theirs.layer
        assert torch.equal(ours.query, theirs.query)
        assert torch.equal(ours.key, theirs.key)
    names = [name for name, _ in attention_layers(generator.unet) if name.endswith("attn2")]
    assert sorted(record.layer for record in cross) == sorted(names)
    for record in cross:
        layer = generator.unet.get_submodule(record.layer)
        expected = layer.head_to_batch_dim(layer.to_k(embeddings))
        torch.testing.assert_close(record.key.flatten(0, 1), expected, rtol=0, atol=1e-5)
        assert record.query.shape[2] == record.grid[0] * record.grid[1]


@pytest.mark.parametrize("cross", [False, True])
def test_a_pass_that_ends_early_records_what_a_whole_one_does(
    generator: StableDiffusion, cross: bool
) -> None:
    noisy, embeddings = torch.randn(1, 4, 10, 14), generator.embed(["A photo of dog"])
    own: list[AttentionRecord] = []
    across: list[AttentionRecord] = []
    whole = {
        name: RecordingProcessor(name, {140: (10, 14), 35: (5, 7), 12: (3, 4)}, own, across)
        for name, _ in attention_layers(generator.unet)
    }
    before = {name: layer.processor for name, layer in attention_layers(generator.unet)}
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in generator.unet.named_modules()
    ]
    with torch.no_grad():
        with installed(generator.unet, whole):
            generator.denoise(noisy, 100, embeddings)
        # As they run: the middle block is listed behind those that follow it.
        last = [name for name in ran if name.endswith(("attn1", "attn2") if cross else "attn1")][-1]
        ran.clear()
        if cross:
            found = generator.attention(noisy, 100, embeddings)
        else:
            found = generator.self_attention(noisy, 100, embeddings), across
    for handle in handles:
        handle.remove()
    assert "conv_in" in ran
    assert not {last, "conv_out", ""} & set(ran)
    for records, expected in zip(found, (own, across), strict=True):
        assert [record.layer for record in records] == [record.layer for record in expected]
        for ours, theirs in zip(records, expected, strict=True):
            assert torch.equal(ours.query, theirs.query)
            assert torch.equal(ours.key, theirs.key)
    assert {name: layer.processor for name, layer in attention_layers(generator.unet)} == before


def test_an_error_within_a_recorded_pass_is_not_swallowed(generator: StableDiffusion) -> None:
    before = {name: layer.processor for name, layer in attention_layers(generator.unet)}
    with pytest.raises(RuntimeError):
        generator.self_attention(torch.randn(1, 3, 8, 8), 100, generator.embed([""]))
    assert {name: layer.processor for name, layer in attention_layers(generator.unet)} == before


@pytest.mark.parametrize(
    ("prompt", "name", "start", "positions"),
    [
        ("A photo of dog", "dog", 0, [4]),
        ("A photo of zebra disc", "zebra disc", 0, [4, 5]),
        ("A photo of dog and zebra disc", "disc", 0, [7]),
        ("A photo of disc and disc", "disc", 12, [6]),
        ("A photo of Dining  Table", "dining table", 0, [4, 5]),
        # Not in the vocabulary: it falls into its letters.
        ("A photo of emu and dog", "emu", 0, [4, 5, 6]),
    ],
)
def test_tokens_of_a_name_are_found(
    generator: StableDiffusion, prompt: str, name: str, start: int, positions: list[int]
) -> None:
    mask = generator.token_mask(prompt, name, start)
    assert len(mask) == 77
    assert mask.nonzero().flatten().tolist() == positions


WORDS = st.sampled_from(["dog", "cat", "zebra", "disc", "potted", "plant", "emu", "x"])


@settings(max_examples=30)
@given(before=st.lists(WORDS, max_size=4), name=st.lists(WORDS, min_size=1, max_size=3))
def test_marked_tokens_spell_the_name(sd1_folder: Path, before: list[str], name: list[str]) -> None:
    generator = _cached_generator(str(sd1_folder))
    prefix = "".join(f"{word} " for word in before)
    prompt = prefix + " ".join(name)
    mask = generator.token_mask(prompt, " ".join(name), len(prefix))
    ids = torch.tensor(generator.tokenizer(prompt)["input_ids"])
    assert generator.tokenizer.decode(ids[mask[: len(ids)]]) == " ".join(name)


_GENERATORS: dict[str, StableDiffusion] = {}


def _cached_generator(folder: str) -> StableDiffusion:
    if folder not in _GENERATORS:
        _GENERATORS[folder] = StableDiffusion.from_pretrained(folder)
    return _GENERATORS[folder]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    ("template", "name", "marked"),
    [
        ("a photo of a {}.", "brick (block)", "brick(block)."),
        ("a photo of a {}, potted plant", "brick (block)", "brick(block),"),
        ('a photo of "{}"', "(brick) block", '"(brick)block'),
        ("a photo of a {}.", "brick", "brick"),
    ],
)
def test_punctuation_beside_a_name_does_not_hide_it(
    sd1_folder: Path, tmp_path: Path, template: str, name: str, marked: str, joined: bool
) -> None:
    from conftest import WORDS, write_tokenizer

    folder = tmp_path / "tokenizer"
    if joined:  # as CLIP's own vocabulary has them
        write_tokenizer(folder, [*WORDS, ").", "),", '"('])
    else:
        shutil.copytree(sd1_folder / "tokenizer", folder)
        marked = marked.rstrip(".,").lstrip('"')
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    prompt, start = template.replace("{}", name), template.index("{}")
    mask = mark_tokens(tokenizer, prompt, name, start, 77)
    ids = tokenise(tokenizer, prompt, 77)[mask].tolist()
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert "".join(tokens).replace("</w>", "") == marked


@pytest.mark.parametrize("name", ["cat", "", "do"])
def test_a_name_that_is_not_in_the_prompt_is_refused(generator: StableDiffusion, name: str) -> None:
    with pytest.raises(ConfigurationError, match="is not in the prompt"):
        generator.token_mask("A photo of dog", name)


def test_a_prompt_too_long_for_the_model_is_refused(generator: StableDiffusion) -> None:
    with pytest.raises(ConfigurationError, match="tokens; the model reads 77"):
        generator.embed(["dog " * 80])


def test_half_precision_gives_float32_latents_and_images(sd1_folder: Path) -> None:
    generator = StableDiffusion.from_pretrained(str(sd1_folder), torch.bfloat16)
    exact = StableDiffusion.from_pretrained(str(sd1_folder))
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = generator.encode(images)
        assert latents.dtype == torch.float32
        torch.testing.assert_close(latents, exact.encode(images), rtol=0.1, atol=0.05)
        embeddings = generator.embed(["A photo of dog"])
        injection = injection_of(generator, torch.rand(1, 1, 64, 64), ["dog"], 10.0)
        output = generator.denoise(latents, 400, embeddings, injection)
        expected = exact.denoise(latents, 400, exact.embed(["A photo of dog"]), injection)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0.1, atol=0.05)
