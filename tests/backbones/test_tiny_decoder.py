"""Decoding by a small real AutoencoderTiny on disk, against diffusers' own decode."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cut_weights import drop_weights
from diffusers import AutoencoderTiny
from torch import Tensor

from g4seg_pl.backbones.pretrained import load_generator
from g4seg_pl.backbones.tiny_decoder import check_decoder
from g4seg_pl.module import G4SegModule
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import ConfigurationError

FOLDERS = ("sd1_folder", "sd2_folder", "sdxl_folder")


@pytest.fixture
def latents() -> Tensor:
    # Some beyond what the clamp of the decoder lets through.
    return 3 * torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(0))


def expected(folder: Path, latents: Tensor) -> Tensor:
    """What diffusers makes of latents in the U-Net's own scale."""
    with torch.no_grad():
        picture: Tensor = AutoencoderTiny.from_pretrained(folder).eval().decode(latents).sample
    assert picture.abs().max() > 1  # else clamping would not be tested
    return picture.clamp(-1, 1)


@pytest.mark.parametrize("name", FOLDERS)
def test_pictures_are_diffusers_own_and_latents_the_full_autoencoders(
    name: str, tiny_decoder_folder: Path, latents: Tensor, request: pytest.FixtureRequest
) -> None:
    model = str(request.getfixturevalue(name))
    with_tiny = load_generator(model, decoder=str(tiny_decoder_folder))
    full = load_generator(model)
    images = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        decoded = with_tiny.decode(latents)
        torch.testing.assert_close(decoded, expected(tiny_decoder_folder, latents))
        assert torch.equal(with_tiny.encode(images), full.encode(images))
        assert (decoded - full.decode(latents)).abs().max() > 0.1


def test_a_scale_of_its_own_is_heeded(sd1_folder: Path, tmp_path: Path, latents: Tensor) -> None:
    from conftest import write_tiny_decoder

    folder = write_tiny_decoder(tmp_path / "tiny", scaling_factor=2.0, shift_factor=0.25)
    with torch.no_grad():
        found = load_generator(str(sd1_folder), decoder=str(folder)).decode(latents)
    torch.testing.assert_close(found, expected(folder, latents / 2 + 0.25))


def test_neither_the_full_decoder_nor_the_tiny_encoder_is_kept(
    sd1_folder: Path, tiny_decoder_folder: Path
) -> None:
    generator = load_generator(str(sd1_folder), decoder=str(tiny_decoder_folder))
    names = {name for name, _ in generator.named_parameters()}
    assert not [name for name in names if name.startswith(("vae.decoder", "vae.post_quant"))]
    assert not [name for name in names if name.startswith("decoder.encoder")]
    assert any(name.startswith("decoder.decoder") for name in names)
    assert not any(weight.requires_grad for weight in generator.parameters())
    assert not any(module.training for module in generator.modules())


def test_weights_of_halves_that_are_not_kept_may_be_missing_but_no_others(
    sd1_folder: Path, tiny_decoder_folder: Path, tmp_path: Path, latents: Tensor
) -> None:
    model, tiny = tmp_path / "model", tmp_path / "tiny"
    shutil.copytree(sd1_folder, model)
    shutil.copytree(tiny_decoder_folder, tiny)
    drop_weights(model / "vae", "decoder.")
    drop_weights(tiny, "encoder.")
    with torch.no_grad():
        found = load_generator(str(model), decoder=str(tiny)).decode(latents)
    torch.testing.assert_close(found, expected(tiny_decoder_folder, latents))
    drop_weights(tiny, "decoder.layers.0.")
    with pytest.raises(ConfigurationError, match=r"decoder .*tiny cannot .*decoder\.layers\.0"):
        load_generator(str(sd1_folder), decoder=str(tiny))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_pictures(
    dtype: torch.dtype, sdxl_folder: Path, tiny_decoder_folder: Path, latents: Tensor
) -> None:
    generator = load_generator(str(sdxl_folder), dtype, decoder=str(tiny_decoder_folder))
    assert generator.decoder is not None
    # SDXL's own autoencoder overflows in float16; a tiny decoder does not.
    assert {weight.dtype for weight in generator.decoder.parameters()} == {dtype}
    with torch.no_grad():
        found = generator.decode(latents)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(tiny_decoder_folder, latents), rtol=0, atol=0.1)


def test_the_papers_update_reads_its_pictures(sd1_folder: Path, tiny_decoder_folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    mask = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)
    seen: list[Any] = []
    options: dict[str, Any] = {"recipe": "paper", "device": "cpu"}
    tiny = G4SegRefiner.from_pretrained(
        str(sd1_folder), decoder=str(tiny_decoder_folder), **options
    )
    full = G4SegRefiner.from_pretrained(str(sd1_folder), **options)
    found = [
        refiner.refine(pixels, {"dog": mask}, callback=seen.append)["dog"]
        for refiner in (tiny, full)
    ]
    pictures = [state.artifacts["generated"] for state in seen]
    assert (pictures[0] - pictures[1]).abs().max() > 0.1
    assert not np.array_equal(*found)


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy whose configuration says something else; its weights are not looked at."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "AutoencoderKL"}, "it is a AutoencoderKL, not an AutoencoderTiny"),
        ({"latent_channels": 16}, "latents of 16 channels, the model's autoencoder makes 4"),
        ({"num_decoder_blocks": [3, 3, 3, 1]}, "enlarges latents 8 times, .* 4 times"),
        ({"upsampling_scaling_factor": 4}, "enlarges latents 16 times"),
        ({"out_channels": 4}, "pictures of 4 channels"),
    ],
)
def test_a_decoder_of_another_model_is_refused_before_weights_load(
    changes: dict[str, Any],
    said: str,
    sd1_folder: Path,
    tiny_decoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = edited(tiny_decoder_folder, tmp_path / "tiny", **changes)
    monkeypatch.setattr("g4seg_pl.backbones.loading.load_decoder", pytest.fail)
    with pytest.raises(ConfigurationError, match=f"{said}.*give one made for this model") as found:
        load_generator(str(sd1_folder), decoder=str(folder))
    assert str(folder) in str(found.value)
    with pytest.raises(ConfigurationError, match=said):
        G4SegModule(str(sd1_folder), decoder=str(folder)).setup("predict")


def test_defaults_that_a_configuration_leaves_out_count(
    sd1_folder: Path, tiny_decoder_folder: Path, tmp_path: Path
) -> None:
    folder = edited(tiny_decoder_folder, tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    for name in ("num_decoder_blocks", "latent_channels", "out_channels"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="enlarges latents 8 times"):
        check_decoder(str(folder), str(sd1_folder))


def test_what_is_no_decoder_at_all_is_named(
    sd1_folder: Path, tiny_decoder_folder: Path, tmp_path: Path
) -> None:
    model = str(sd1_folder)
    for name in ("nowhere", "no/such/folder", ""):
        with pytest.raises(
            ConfigurationError, match=r"decoder '.*' is no folder; give a diffusers"
        ):
            check_decoder(name, model)
    with pytest.raises(ConfigurationError, match=r"\(a whole pipeline\?\) has no config.json"):
        check_decoder(model, model)
    broken = edited(tiny_decoder_folder, tmp_path / "broken")
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigurationError, match=r"decoder .*broken cannot be loaded"):
        load_generator(model, decoder=str(broken))
    (broken / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"broken cannot be loaded .*check the folder"):
        check_decoder(str(broken), model)


# diffusers passes huggingface_hub an argument it no longer takes.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_a_hub_id_that_cannot_be_reached_is_named(sd1_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="decoder nobody/nothing cannot be loaded"):
        check_decoder("nobody/nothing", str(sd1_folder))
