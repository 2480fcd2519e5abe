"""The whole recipe in miniature: every stage trains, resumes, and ends in folders others load."""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.world import data, export, train
from g4seg_pl.world.autoencoder import build_autoencoder, colour_loss
from g4seg_pl.world.check import Gate, _peaks_inside, report
from g4seg_pl.world.classifier import SceneClassifier, disturbed
from g4seg_pl.world.clip import ClipTask, fused
from g4seg_pl.world.folders import GENERATOR
from g4seg_pl.world.scenes import CLASS_NAMES
from g4seg_pl.world.tiny import TinyDecoderTask, held_out_latents
from g4seg_pl.world.unet import UNetTask, build_scheduler, draw_caption, warm_average

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice to people who train for days
    pytest.mark.slow,
]


def miniature(root: Path) -> argparse.Namespace:
    """Two optimiser steps of every stage, the U-Net stopped and resumed, few scenes in each."""
    options = argparse.Namespace(
        cache=root / "cache",
        out=root / "train",
        shards=1,
        steps=2,
        threads=1,
        compile=False,
        continue_published=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD", 80)
        patch.setattr(train, "BATCH", 8)
        patch.setattr(train, "held_out", lambda split, count: data.held_out(split, 8))
        patch.setattr(train, "held_out_latents", partial(held_out_latents, count=8))
        for stage in (train.train_teacher, train.train_vae, train.encode_latents):
            stage(options)
        train.train_tiny(options)
        train.train_clip(options)
        train.train_judge(options)
        train.train_unet(options)
        options.steps = 3
        train.train_unet(options)
    return options


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    """The recipe in miniature, on whatever this machine has."""
    return miniature(tmp_path_factory.mktemp("recipe"))


def test_unet_resumes_where_it_stopped(trained: argparse.Namespace) -> None:
    checkpoint = torch.load(trained.out / "unet" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 3


def test_scaled_latents_have_unit_deviation(trained: argparse.Namespace) -> None:
    latents = np.load(trained.cache / "latents_000.npy").astype(np.float32)
    assert latents.shape[1:] == (4, 16, 16)
    assert latents.std() == pytest.approx(1, abs=0.1)


def test_guides_are_the_teachers_standardised_maps(trained: argparse.Namespace) -> None:
    guides = np.load(trained.cache / "guides_000.npy").astype(np.float32)
    rows = torch.from_numpy(np.load(trained.cache / "scenes_000.npy"))
    with torch.inference_mode():
        maps = train.load_teacher(trained.out).features(data.split_row(rows)[0])[-1]
    maps = (maps - maps.mean((0, 2, 3), keepdim=True)) / (maps.std((0, 2, 3), keepdim=True) + 1e-3)
    # The recipe computes them in bf16.
    assert np.abs(guides - maps.numpy()).mean() < 0.05


def test_decoder_stage_leaves_the_latents_alone(trained: argparse.Namespace) -> None:
    options = argparse.Namespace(**{**vars(trained), "steps": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "held_out", lambda split, count: data.held_out(split, 8))
        options.out = trained.out / "elsewhere"
        train.train_decoder(options)
    after = train.load_vae(options.out).state_dict()
    published = AutoencoderKL.from_pretrained(GENERATOR, subfolder="vae").state_dict()
    kept = [name for name in after if name.startswith(("encoder", "quant_conv"))]
    assert kept
    assert all(torch.equal(after[name], published[name]) for name in kept)
    assert any(not torch.equal(after[name], published[name]) for name in after)


def test_tiny_decoder_is_one_that_diffusers_loads_and_decodes_these_latents(
    trained: argparse.Namespace, tmp_path: Path
) -> None:
    export.export_tiny(trained.out, tmp_path)
    tiny = AutoencoderTiny.from_pretrained(tmp_path)
    latents = torch.from_numpy(np.load(trained.cache / "latents_000.npy")[:2]).float()
    assert tiny.decode(latents).sample.shape == (2, 3, 64, 64)
    task = torch.load(trained.out / "tiny" / "last.ckpt", weights_only=True)["state_dict"]
    for name, weight in tiny.state_dict().items():
        assert torch.equal(weight, task[f"tiny.{name}"])


def test_only_the_decoder_of_the_tiny_autoencoder_learns() -> None:
    task = TinyDecoderTask(steps=2)
    before = {name: weight.clone() for name, weight in task.named_parameters()}
    optimizer = task.configure_optimizers()["optimizer"]
    task.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    task.training_step((torch.rand(2, 3, 64, 64), torch.randn(2, 4, 16, 16))).backward()
    optimizer.step()
    changed = {name for name, weight in task.named_parameters() if weight.ne(before[name]).any()}
    assert changed
    assert all(name.startswith("tiny.decoder.") for name in changed)


def test_generator_folder_is_one_that_diffusers_loads(
    trained: argparse.Namespace, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    scale = json.loads((trained.cache / "scaling_factor.json").read_text())["scaling_factor"]
    export.export_generator(trained.out, scale, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a photo of star", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)
    ours = StableDiffusion.from_pretrained(str(tmp_path))
    assert ours.image_size == 64
    assert ours.token_mask("a photo of zebra disc", "zebra disc").sum() == 2


def test_exported_unet_is_the_average_not_the_last_step(
    trained: argparse.Namespace, tmp_path: Path
) -> None:
    state = torch.load(trained.out / "unet" / "last.ckpt", weights_only=False)["state_dict"]
    model = export.averaged_model(trained.out, train.load_tokenizer(trained.out))
    name = "unet.conv_in.weight"
    exported = dict(model.named_parameters())[name]
    assert torch.equal(exported, state[f"average.module.{name}"])
    assert not torch.equal(exported, state[f"model.{name}"])


def test_training_goes_on_from_published_weights(
    trained: argparse.Namespace, tmp_path: Path
) -> None:
    export.export_generator(trained.out, 1.0, tmp_path)
    task = UNetTask(train.load_tokenizer(trained.out))
    task.start_from(tmp_path)
    published = export.averaged_model(trained.out, train.load_tokenizer(trained.out))
    for ours in (task.model, task.average.module):
        shared = [pair for pair in published.named_parameters() if "guide" not in pair[0]]
        for name, weight in shared:
            # The U-Net is published as float16.
            assert torch.allclose(dict(ours.named_parameters())[name], weight, atol=1e-3)


def test_clip_goes_on_from_published_weights(
    trained: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.export_clip(trained.out, tmp_path)
    started = {}

    def keep(task: ClipTask, *_: object) -> None:
        started.update(task.clip.state_dict())

    monkeypatch.setattr(train, "CLIP", tmp_path)
    monkeypatch.setattr(train, "fit", keep)
    monkeypatch.setattr(train, "held_out", lambda split, count: data.held_out(split, 8))
    train.train_clip(argparse.Namespace(**{**vars(trained), "continue_published": True}))
    published = load_file(tmp_path / "open_clip_model.safetensors")
    assert set(published) == set(started)
    assert all(torch.equal(weight, started[name]) for name, weight in published.items())


def test_average_forgets_its_start_soon_and_then_moves_slowly() -> None:
    torch.manual_seed(0)
    weights = torch.randn(20_000, 3)
    expected, moved = weights[0].clone(), weights[0].clone()
    for count, weight in enumerate(weights[1:], start=1):
        share = min(0.9995, (1 + count) / (10 + count))
        expected = share * expected + (1 - share) * weight
        warm_average([moved], [weight], count)
    assert torch.allclose(moved, expected, atol=1e-5)
    start, still = torch.ones(1), torch.zeros(1)
    for count in range(1, 100):
        warm_average([start], [still], torch.tensor(count))
    assert 0 < float(start) < 1e-6


def test_fused_teacher_sees_the_same() -> None:
    teacher = SceneClassifier()
    for norm in [m for m in teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
        torch.nn.init.normal_(norm.running_mean)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = teacher.eval()(images)
        quick = fused(teacher)
        found = quick(images.to(quick.head.weight.dtype)).float()
    assert torch.allclose(found, expected, atol=0.05 * float(expected.abs().max()))


def test_disturbed_pictures_stay_pictures_and_half_are_untouched() -> None:
    torch.manual_seed(0)
    images = torch.rand(160, 3, 16, 16) * 2 - 1
    changed = (disturbed(images) != images).flatten(1).any(1)
    assert 0.2 < changed.float().mean() < 0.8


def test_clip_folder_is_one_that_open_clip_loads(
    trained: argparse.Namespace, tmp_path: Path
) -> None:
    import open_clip

    export.export_clip(trained.out, tmp_path)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    images = torch.rand(2, 3, 64, 64)
    assert model.encode_image(images).shape == (2, 128)


def test_captions_name_what_is_there() -> None:
    presence = np.zeros(len(CLASS_NAMES), np.uint8)
    presence[[2, 7]] = 1
    rng = np.random.default_rng(0)
    captions = {draw_caption(presence, rng) for _ in range(200)}
    assert captions == {
        "",
        "a photo of star",
        "a photo of cheese wedge",
        "a photo of star and cheese wedge",
        "a photo of cheese wedge and star",
    }


def test_schedule_is_stable_diffusions() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    expected = torch.cumprod(1 - betas, 0)
    assert torch.allclose(build_scheduler().alphas_cumprod, expected, rtol=1e-5)


def test_colour_loss_weighs_hue_above_brightness() -> None:
    image = torch.zeros(1, 3, 4, 4)
    brighter = image + 0.1
    redder = image.clone()
    redder[:, 0] += 0.1
    redder[:, 2] -= 0.1
    assert colour_loss(image, image) == 0
    assert colour_loss(redder, image) > colour_loss(brighter, image)


def test_autoencoder_shrinks_four_times() -> None:
    latent = build_autoencoder().encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
    assert latent.shape == (1, 4, 16, 16)


def test_peaks_are_counted_by_hand() -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[:, :4, :4] = 3
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0] = 1  # on the object
    maps[1, 3, 3] = 1  # off it
    assert _peaks_inside(maps, masks) == 0.5


def test_gate_report_shows_what_was_missed() -> None:
    text = report([Gate("good", 0.9, 0.8, "d"), Gate("bad", 0.7, 0.8, "d")])
    assert "| good | 0.900 | ≥ 0.8 | yes |" in text
    assert "| bad | 0.700 | ≥ 0.8 | NO |" in text
