"""Masks through a ControlNet: picture, residuals and what may be asked, against diffusers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones.passes import first_pass
from cut_weights import drop_weights
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from torch import Tensor

from datamodules.classes import read_class_list
from g4seg_pl.backbones.ade20k import COLOURS, NEAREST
from g4seg_pl.backbones.control_image import colour_of, coloured, require_colours
from g4seg_pl.backbones.controlnet import ControlledGenerator, ControlNetInjection
from g4seg_pl.backbones.pretrained import load_generator
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.injection import Injection
from g4seg_pl.core.protocols import Generator
from g4seg_pl.core.steps import Correspondence
from g4seg_pl.types import ConfigurationError

PROMPT = "A photo of dog"
ANIMAL = (255, 0, 122)


@pytest.fixture(scope="module")
def generator(sd1_folder: Path, controlnet_folder: Path) -> ControlledGenerator:
    plain = load_generator(str(sd1_folder))
    return ControlNetInjection(str(controlnet_folder)).load(plain, torch.float32)


@pytest.fixture
def noisy() -> Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def injection_of(generator: Generator, weight: float = 10.0, **options: Any) -> Injection:
    masks = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    tokens = generator.token_mask(PROMPT, "dog").expand(2, 1, -1).to(masks)
    return Injection(masks, tokens, weight, **({"classes": (("dog",), ("dog",))} | options))


@pytest.mark.parametrize(
    ("name", "colour"),
    [
        ("airplane", (0, 255, 82)),
        ("aeroplane", (0, 255, 82)),
        ("Dining  Table", (255, 6, 82)),
        ("dog", ANIMAL),
        ("person with clothes,people,human", (150, 5, 61)),
        ("potted plant", (204, 255, 4)),
        ("sofa", (11, 102, 255)),
        ("tvmonitor screen", (0, 255, 194)),
        ("motorbike", (163, 0, 255)),
        ("wall", (120, 120, 120)),
        ("flag", (92, 0, 255)),
    ],
)
def test_colours_are_ade20ks(name: str, colour: tuple[int, int, int]) -> None:
    assert colour_of(name, {}) == colour


def test_the_palette_has_every_class_in_order_and_one_colour_twice() -> None:
    classes = read_class_list("ade20k")
    assert tuple(COLOURS) == classes.names
    for name, prompt in zip(classes.names, classes.prompts, strict=True):
        assert colour_of(prompt, {}) == tuple(bytes.fromhex(COLOURS[name]))
    assert len(set(COLOURS.values())) == 149
    assert COLOURS["road"] == COLOURS["skyscraper"]
    assert set(NEAREST.values()) <= set(COLOURS)


@pytest.mark.parametrize("name", ["voc", "voc_clip_es"])
def test_of_vocs_classes_only_train_is_without_a_colour(name: str) -> None:
    prompts = read_class_list(name).prompts
    require_colours(prompts, {"train": "bus"})
    with pytest.raises(ConfigurationError, match="no class near to train; give each"):
        require_colours(prompts, {})


def test_a_class_without_a_colour_asks_for_one() -> None:
    with pytest.raises(ConfigurationError, match=r"'train': ADE20K has no class near.*train.: bus"):
        colour_of("train", {})
    assert colour_of("train", {"Train": "bus"}) == (255, 0, 245)
    assert colour_of("dog", {"dog": (1, 2, 3)}) == (1, 2, 3)
    with pytest.raises(ConfigurationError, match="'tram' is no class of ADE20K"):
        colour_of("train", {"train": "tram"})
    with pytest.raises(ConfigurationError, match="three numbers from 0 to 255"):
        colour_of("train", {"train": (1, 2, 256)})


def test_hard_masks_are_painted_exactly_and_the_rest_is_background() -> None:
    masks = torch.zeros(2, 2, 4, 6)
    masks[0, 0, :2], masks[0, 1, 2, :3], masks[1, 0, 3] = 1, 1, 1
    picture = coloured(masks, [[(255, 0, 122), (0, 102, 200)], [(6, 230, 230)]], (9, 8, 7))
    assert picture.shape == (2, 3, 4, 6)
    bytes_ = (picture * 255).round().permute(0, 2, 3, 1)
    expected = torch.tensor([9.0, 8, 7]).expand(2, 4, 6, 3).clone()
    expected[0, :2] = torch.tensor([255.0, 0, 122])
    expected[0, 2, :3] = torch.tensor([0.0, 102, 200])
    expected[1, 3] = torch.tensor([6.0, 230, 230])
    assert torch.equal(bytes_, expected)


def test_a_map_of_the_background_itself_is_painted_as_background() -> None:
    inside = torch.rand(1, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    competing = torch.cat([inside, 1 - inside], dim=1)
    colours = [[(255, 0, 122)]]
    found, expected = (coloured(each, colours, (9, 8, 7)) for each in (competing, inside))
    torch.testing.assert_close(found, expected)


def test_soft_and_overlapping_masks_stay_between_their_colours() -> None:
    masks = torch.rand(1, 2, 8, 8, requires_grad=True)
    picture = coloured(masks, [[(255, 0, 0), (0, 255, 0)]])
    assert picture.min() >= 0
    assert picture.sum(1).max() <= 1 + 1e-6
    picture.sum().backward()
    assert masks.grad is not None
    assert masks.grad.abs().max() > 0


def test_it_is_a_generator_with_frozen_parts(generator: ControlledGenerator) -> None:
    assert isinstance(generator, Generator)
    # From 3.12 on isinstance sees what the class has, not a buffer that __getattr__ finds.
    assert all(hasattr(ControlledGenerator, name) for name in vars(Generator) if name[0] != "_")
    assert {name for name, _ in generator.named_children()} == {"generator", "controlnet"}
    assert not any(weight.requires_grad for weight in generator.parameters())
    assert generator.image_size == 64


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_one_pass_has_the_pipelines_picture_residuals_and_output(
    sd1_folder: Path, controlnet_folder: Path, generator: ControlledGenerator, scale: float
) -> None:
    injection = injection_of(generator)
    one = replace(
        injection,
        foreground=injection.foreground[:1],
        tokens=injection.tokens[:1],
        classes=(("dog",),),
    )
    shown = generator.picture(one, (16, 16))
    net = ControlNetModel.from_pretrained(controlnet_folder)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(sd1_folder, controlnet=net)
    call = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 1.0, "image": shown}
    theirs = first_pass(pipeline, pipeline.unet, controlnet_conditioning_scale=scale, **call)
    ours = ControlledGenerator(load_generator(str(sd1_folder)), net, scale)
    with torch.no_grad():
        embeddings = ours.embed([PROMPT])
        asked = (theirs.sample, theirs.timestep, embeddings)
        residuals = ours._residuals(*asked, shown)
        output = ours.denoise(*asked, one)
    expected = theirs.told["down_block_additional_residuals"]
    assert len(residuals.down) == len(expected)
    for found, wanted in zip(residuals.down, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    middle = theirs.told["mid_block_additional_residual"]
    torch.testing.assert_close(residuals.middle, middle, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output, theirs.output, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert (output - ours.denoise(*asked)).abs().max() > 1e-4


def test_sdxl_takes_one_too(sdxl_folder: Path, tmp_path: Path) -> None:
    from conftest import write_controlnet

    folder = write_controlnet(tmp_path / "controlnet", sdxl_folder)
    plain = load_generator(str(sdxl_folder))
    ours = ControlNetInjection(str(folder)).load(plain, torch.float32)
    injection = injection_of(ours)
    one = replace(injection, foreground=injection.foreground[:1], tokens=injection.tokens[:1])
    one = replace(one, classes=(("dog",),))
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(
        sdxl_folder, controlnet=ControlNetModel.from_pretrained(folder), add_watermarker=False
    )
    shown = ours.picture(one, (16, 16))
    call = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 1.0, "image": shown}
    with pytest.MonkeyPatch.context() as patch:
        # Euler's own way to NumPy is deprecated; another sampler asks the same of the U-Net.
        from diffusers import DDIMScheduler

        patch.setattr(pipeline, "scheduler", DDIMScheduler.from_config(pipeline.scheduler.config))
        theirs = first_pass(pipeline, pipeline.unet, controlnet_conditioning_scale=1.0, **call)
    with torch.no_grad():
        output = ours.denoise(theirs.sample, theirs.timestep, ours.embed([PROMPT]), one)
    torch.testing.assert_close(output, theirs.output, rtol=1e-4, atol=1e-5)


def test_without_an_active_injection_the_unet_is_untouched(
    generator: ControlledGenerator, noisy: Tensor
) -> None:
    with torch.no_grad():
        embeddings = generator.embed([PROMPT] * 2)
        expected = generator.generator.denoise(noisy, 400, embeddings)
        off = injection_of(generator, 0.0)
        assert torch.equal(generator.denoise(noisy, 400, embeddings, off), expected)
        assert torch.equal(generator.denoise(noisy, 400, embeddings), expected)


def test_the_weight_of_attention_does_not_matter_but_masks_and_classes_do(
    generator: ControlledGenerator, noisy: Tensor
) -> None:
    with torch.no_grad():
        embeddings = generator.embed([PROMPT] * 2)
        plain = generator.denoise(noisy, 400, embeddings, injection_of(generator, 1.0))
        same = generator.denoise(noisy, 400, embeddings, injection_of(generator, 50.0))
        cars = injection_of(generator, classes=(("car",), ("dog",)))
        other = generator.denoise(noisy, 400, embeddings, cars)
        empty = injection_of(generator)
        empty = replace(empty, foreground=0 * empty.foreground)
        without = generator.denoise(noisy, 400, embeddings, empty)
    assert torch.equal(same, plain)
    assert (other[0] - plain[0]).abs().max() > 1e-6
    torch.testing.assert_close(other[1], plain[1])
    assert (without - plain).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "dense_diffusion", "weight": 1.0}, "leave injection_rule"),
        ({"cross_attention": False}, "leave injection_rule"),
        ({"classes": ()}, "names classes of 0 rows, masks are of 2"),
        ({"classes": (("dog",), ("train",))}, "'train': ADE20K has no class near"),
    ],
)
def test_what_only_attention_can_do_is_refused(
    generator: ControlledGenerator, noisy: Tensor, options: dict[str, Any], message: str
) -> None:
    injection = injection_of(generator, **options)
    with pytest.raises(ConfigurationError, match=message):
        generator.denoise(noisy, 400, generator.embed([PROMPT] * 2), injection)


@pytest.fixture
def context(generator: ControlledGenerator) -> RefinementContext:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return RefinementContext(
        images=images,
        image_ids=("one", "two"),
        class_names=("dog", "cat", "bus"),
        owner=torch.tensor([0, 0, 1]),
        generator=generator,
        features=lambda pictures: torch.nn.functional.pixel_unshuffle(pictures, 8),
        masks_per_pass=2,
    )


@pytest.fixture
def masks() -> Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("together", [False, True])
def test_everything_after_the_injection_is_unchanged(
    context: RefinementContext,
    generator: ControlledGenerator,
    masks: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    together: bool,
) -> None:
    """The paper's update runs, and shows the ControlNet each row's masks with their classes."""
    shown: list[tuple[tuple[str, ...], ...]] = []
    picture = generator.picture

    def keep(injection: Injection, grid: tuple[int, int]) -> Tensor:
        shown.extend(injection.classes)
        return picture(injection, grid)

    monkeypatch.setattr(generator, "picture", keep)
    step = Correspondence(all_classes_at_once=together, confidence_range=None)
    refined = step(masks, context)
    assert refined.shape == masks.shape
    assert shown == ([("dog", "cat"), ("bus",)] if together else [("dog",), ("cat",), ("bus",)])
    off = Correspondence(all_classes_at_once=together, confidence_range=None, injection_weight=0.0)(
        masks, context
    )
    assert (off - refined).abs().max() > 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_goes_through_the_picture(
    generator: ControlledGenerator, noisy: Tensor, checkpointing: bool
) -> None:
    embeddings = generator.embed([PROMPT] * 2)

    def loss(foreground: Tensor, recompute: bool) -> Tensor:
        injection = replace(injection_of(generator, binarise_at=None), foreground=foreground)
        output = generator.denoise(noisy, 400, embeddings, injection, checkpointing=recompute)
        return output.square().mean()

    soft = injection_of(generator).foreground.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(soft, checkpointing), soft)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        change = loss(soft + 0.5 * direction, False) - loss(soft - 0.5 * direction, False)
    assert float(change) == pytest.approx(float(gradient.norm()), rel=0.1)


def test_the_gradient_step_runs_on_it(context: RefinementContext, masks: Tensor) -> None:
    refined = Gradient(iterations=1)(masks, context)
    assert (refined - masks).abs().max() > 1e-6


@pytest.fixture
def broken_folder(controlnet_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "controlnet"
    shutil.copytree(controlnet_folder, folder)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_dim": 1024}, r"its cross_attention_dim is 1024, the generator's 16"),
        ({"_class_name": "ControlNetUnionModel"}, "it is a ControlNetUnionModel"),
    ],
)
def test_a_controlnet_of_another_make_is_refused_before_weights_load(
    broken_folder: Path, sd1_folder: Path, changes: dict[str, Any], message: str
) -> None:
    file = broken_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigurationError, match=message):
        ControlNetInjection(str(broken_folder)).check(str(sd1_folder))


def test_a_controlnet_that_lacks_weights_is_refused(
    controlnet_folder: Path, sd1_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "controlnet"
    shutil.copytree(controlnet_folder, folder)
    drop_weights(folder, "controlnet_cond_embedding.")
    with pytest.raises(ConfigurationError, match=r"controlnet .*shape: controlnet_cond_embedding"):
        ControlNetInjection(str(folder)).load(load_generator(str(sd1_folder)), torch.float32)


def test_other_faults_are_named(
    broken_folder: Path, sd1_folder: Path, sd2_folder: Path, controlnet_folder: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"controlnet .* cannot be loaded"):
        ControlNetInjection(str(broken_folder)).load(load_generator(str(sd1_folder)), torch.float32)
    with pytest.raises(ConfigurationError, match="is no folder; give a diffusers folder or a hub"):
        ControlNetInjection("nowhere").check(str(sd1_folder))
    with pytest.raises(ConfigurationError, match="'tram' is no class of ADE20K"):
        ControlNetInjection(str(controlnet_folder), colours={"train": "tram"}).check(
            str(sd1_folder)
        )
