"""Processors against diffusers' own, and the model left as it was found."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from g4seg_pl.backbones.attention import (
    InjectedProcessor,
    attention_layers,
    checkpointed,
    installed,
    token_grids,
)
from g4seg_pl.core.injection import Injection
from g4seg_pl.types import ConfigurationError


@pytest.fixture(scope="module", params=["sd1_folder", "sd2_folder"])
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    folder: Path = request.getfixturevalue(request.param)
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()


def processor_of(weight: float, height: int, width: int, **options: object) -> InjectedProcessor:
    tokens = torch.zeros(2, 1, 77)
    tokens[:, :, 4] = 1
    masks = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(3))
    injection = Injection(masks, tokens, weight, **options)
    return InjectedProcessor(injection, token_grids(height, width, 3))


def call(unet: UNet2DConditionModel, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, height, width, generator=generator)
    text = torch.randn(2, 77, 16, generator=generator)
    with torch.no_grad():
        return unet(noisy, 400, text)[0]


@pytest.mark.parametrize("size", [(16, 16), (10, 22)])
@pytest.mark.parametrize("options", [{}, {"cross_attention": False, "self_attention": False}])
def test_weight_zero_or_nothing_injected_is_diffusers_own_attention(
    unet: UNet2DConditionModel, size: tuple[int, int], options: dict[str, bool]
) -> None:
    expected = call(unet, *size)
    processor = processor_of(0.0 if not options else 9.0, *size, **options)
    with installed(unet, {name: processor for name, _ in attention_layers(unet)}):
        assert torch.equal(call(unet, *size), expected)


@pytest.mark.parametrize("rule", ["eq5", "dense_diffusion"])
@pytest.mark.parametrize("kind", ["cross_attention", "self_attention"])
def test_each_kind_of_injection_alone_changes_the_output(
    unet: UNet2DConditionModel, rule: str, kind: str
) -> None:
    options = {"cross_attention": False, "self_attention": False, kind: True, "rule": rule}
    processor = processor_of(9.0 if rule == "eq5" else 1.0, 16, 16, **options)
    with installed(unet, {name: processor for name, _ in attention_layers(unet)}):
        changed = call(unet, 16, 16)
    assert (changed - call(unet, 16, 16)).abs().max() > 1e-6


@pytest.mark.parametrize("kind", ["attn1", "attn2"])
@pytest.mark.parametrize("rule", ["eq5", "dense_diffusion"])
def test_layer_of_each_kind_is_the_explicit_formula_at_its_own_strength(
    unet: UNet2DConditionModel, rule: str, kind: str
) -> None:
    cross = kind == "attn2"
    layer = next(layer for name, layer in attention_layers(unet) if name.endswith(kind))
    generator = torch.Generator().manual_seed(1)
    tokens = 3 * torch.randn(2, 10 * 22, layer.query_dim, generator=generator)
    text = torch.randn(2, 77, layer.cross_attention_dim, generator=generator) if cross else None
    weight = 2.0 if rule == "eq5" else 0.8
    processor = processor_of(weight, 10, 22, rule=rule, dense_strengths=(0.9, 0.2))
    rows = (processor.injection.foreground.flatten(2)[:, 0] >= 0.5).float()
    columns = processor.injection.tokens[:, 0] if cross else rows

    def by_hand(strength: float) -> Tensor:
        source = tokens if text is None else text
        query, key, value = (
            to(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for to, x in ((layer.to_q, tokens), (layer.to_k, source), (layer.to_v, source))
        )
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        pairs = (rows[:, :, None] * columns[:, None, :])[:, None]
        if rule == "eq5":
            logits = logits + weight * pairs / query.shape[-1] ** 0.5
        else:
            smaller = 1 - (rows * rows.mean(1, keepdim=True))[:, None, :, None]
            up = pairs * (logits.amax(-1, keepdim=True) - logits)
            down = (1 - pairs) * (logits - logits.amin(-1, keepdim=True))
            logits = logits + weight * strength * smaller * (up - down)
        mixed = logits.softmax(-1) @ value
        return layer.to_out[0](mixed.transpose(1, 2).flatten(2))

    with torch.no_grad():
        found = processor(layer, tokens, text)
        own, other = (0.9, 0.2) if cross else (0.2, 0.9)
        torch.testing.assert_close(found, by_hand(own), rtol=0, atol=1e-5)
        # The two kinds' strengths are far enough apart to be told from each other.
        assert rule == "eq5" or (found - by_hand(other)).abs().max() > 1e-3


def test_default_strengths_of_dense_diffusion_are_the_published_ones() -> None:
    assert processor_of(1.0, 16, 16).injection.dense_strengths == (1.0, 0.3)


def test_processors_are_restored_even_after_an_error(unet: UNet2DConditionModel) -> None:
    layers = attention_layers(unet)
    plain = AttnProcessor()
    layers[0][1].set_processor(plain)
    before = {name: layer.processor for name, layer in layers}
    state = {name: id(weight) for name, weight in unet.state_dict(keep_vars=True).items()}
    processor = processor_of(1.0, 16, 16)

    def fail_inside() -> None:
        with installed(unet, {name: processor for name, _ in layers}):
            assert all(layer.processor is processor for _, layer in layers)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    assert all(layer.processor is before[name] for name, layer in attention_layers(unet))
    assert {name: id(w) for name, w in unet.state_dict(keep_vars=True).items()} == state


def test_a_processor_with_a_meaning_of_its_own_is_not_replaced(unet: UNet2DConditionModel) -> None:
    class Adapter:
        pass

    name, layer = attention_layers(unet)[0]
    found = layer.processor
    layer.processor = Adapter()
    try:
        with (
            pytest.raises(ConfigurationError, match=r"has a Adapter.*unload adapters"),
            installed(unet, {name: processor_of(1.0, 16, 16)}),
        ):
            pass
        assert isinstance(layer.processor, Adapter)
    finally:
        layer.processor = found


@pytest.mark.parametrize("size", [(64, 64), (10, 22), (7, 5)])
def test_grids_halve_and_round_up_as_the_unet_does(size: tuple[int, int]) -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_type=None,
    )
    seen = {size}
    for block in unet.down_blocks:
        block.register_forward_hook(lambda _, __, output: seen.add(tuple(output[0].shape[2:])))
    unet(torch.zeros(1, 4, *size), 0, torch.zeros(1, 1, 1280))
    assert set(token_grids(*size, 3).values()) == seen


@pytest.mark.parametrize("before", [False, True])
def test_gradient_checkpointing_is_left_as_it_was_found(
    unet: UNet2DConditionModel, before: bool
) -> None:
    if before:
        unet.enable_gradient_checkpointing()
    try:
        with checkpointed(unet, {}):
            assert unet.is_gradient_checkpointing
        assert unet.is_gradient_checkpointing == before
    finally:
        unet.disable_gradient_checkpointing()
