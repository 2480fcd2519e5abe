"""DiffSegmenter against attention probabilities caught by hooks on the U-Net's own layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.core.grounding import cross_attention_map, spread_by_self_attention
from g4seg_pl.seeds.diffsegmenter import DiffSegmenter, emphasise
from g4seg_pl.types import ConfigurationError, RefinedMask, Sample


@pytest.fixture(scope="module")
def generator(sd1_folder: Path) -> StableDiffusion:
    model = StableDiffusion.from_pretrained(str(sd1_folder))
    with torch.no_grad():
        # Random weights attend almost evenly; sharpened, a mistake shows.
        for name, weight in model.unet.named_parameters():
            if "to_q" in name:
                weight.mul_(20)
    return model


def probabilities(model: StableDiffusion, noisy: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Every attention layer's probabilities (heads, n, m), by diffusers' own arithmetic."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], options: dict[str, Any], _: Any) -> None:
            hidden = inputs[0] if inputs else options["hidden_states"]
            context = options.get("encoder_hidden_states")
            query = module.head_to_batch_dim(module.to_q(hidden))
            key = module.head_to_batch_dim(module.to_k(hidden if context is None else context))
            found[name] = module.get_attention_scores(query, key)

        return hook

    handles = [
        module.register_forward_hook(keep(name), with_kwargs=True)
        for name, module in model.unet.named_modules()
        if name.endswith(("attn1", "attn2"))
    ]
    model.unet(noisy, 100, text)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def test_maps_agree_with_diffusers_own_probabilities(generator: StableDiffusion) -> None:
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    prompt = "a photograph of dining table"
    text = generator.embed([prompt])
    tokens = generator.token_mask(prompt, "dining table")[None]
    own, cross = generator.attention(noisy, 100, text)
    marked = cross_attention_map(cross, tokens, (0.3, 0.5, 0.1))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # which forms no matrix, and refuses to
        found = spread_by_self_attention(own, marked)

    caught = probabilities(generator, noisy, text)
    chosen = tokens[0].nonzero()[:, 0]
    total = torch.zeros(16, 16)
    for side, weight in ((4, 0.3), (8, 0.5), (16, 0.1)):
        layers = [
            part[:, :, chosen].mean(2)
            for name, part in caught.items()
            if name.endswith("attn2") and part.shape[1] == side * side
        ]
        level = torch.cat(layers).mean(0).reshape(1, 1, side, side)
        level = functional.interpolate(level, (16, 16), mode="bilinear")[0, 0]
        total += weight * (level - level.min()) / (level.max() - level.min())
    assert torch.allclose(marked[0], total, atol=1e-4)
    finest = [part for name, part in caught.items() if name.endswith("attn1")]
    matrix = torch.cat([part for part in finest if part.shape[1] == 256]).mean(0)
    assert torch.allclose(found[0].flatten(), matrix @ total.flatten(), atol=1e-4)
    assert found.std() > 1e-3


@torch.no_grad()
def test_the_pass_and_its_layers_are_left_as_they_were(generator: StableDiffusion) -> None:
    noisy, text = torch.randn(1, 4, 16, 16), generator.embed(["a dog"])
    before = generator.denoise(noisy, 100, text)
    generator.attention(noisy, 100, text)
    assert torch.equal(generator.denoise(noisy, 100, text), before)


def test_emphasis_moves_marked_tokens_only() -> None:
    embeddings, empty = torch.rand(1, 4, 3), torch.rand(1, 4, 3)
    tokens = torch.tensor([[False, True, False, False]])
    found = emphasise(embeddings, empty, tokens, 1.21)
    assert torch.allclose(found[0, 0], embeddings[0, 0])
    moved = empty[0, 1] + 1.21 * (embeddings[0, 1] - empty[0, 1])
    assert torch.allclose(found[0, 1], moved)
    assert torch.allclose(emphasise(embeddings, empty, tokens, 1.0), embeddings)


def test_more_levels_than_weights_are_refused(generator: StableDiffusion) -> None:
    with torch.no_grad():
        text = generator.embed(["a dog"])
        _, cross = generator.attention(torch.randn(1, 4, 16, 16), 100, text)
    with pytest.raises(ConfigurationError, match="level_weights has 1 values"):
        cross_attention_map(cross, torch.ones(1, 77, dtype=torch.bool), (1.0,))


def test_predicts_one_map_a_class_whatever_the_split(sd2_folder: Path, sample: Sample) -> None:
    found = []
    for masks_per_pass in (8, 1):
        maker = DiffSegmenter(str(sd2_folder), dtype="float32", masks_per_pass=masks_per_pass)
        maker.setup("predict")
        maker.configure_model()
        (made,) = maker.predict_step([sample])
        assert isinstance(made, RefinedMask)
        assert made.foreground.shape == (2, 40, 53)
        assert made.foreground.amin((1, 2)).abs().max() == 0
        assert torch.allclose(made.foreground.amax((1, 2)), torch.ones(2))
        found.append(made.foreground)
    assert torch.allclose(found[0], found[1], atol=1e-2)


def test_the_run_record_holds_every_argument(sd1_folder: Path) -> None:
    maker = DiffSegmenter(str(sd1_folder), dtype="float32")
    assert maker.configuration()["dtype"] == "float32"
    with pytest.raises(ConfigurationError, match="nowhere"):
        DiffSegmenter("nowhere").setup("predict")
