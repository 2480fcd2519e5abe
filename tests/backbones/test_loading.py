"""Loading part by part, and refusing what cannot work before any weights load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_weights import drop_weights
from safetensors.torch import load_file, save_file

from g4seg_pl.backbones.kinds import check_model
from g4seg_pl.backbones.loading import load_components, resolve_dtype
from g4seg_pl.types import ConfigurationError


@pytest.fixture
def broken_folder(sd1_folder: Path, tmp_path: Path) -> Path:
    """A copy of a model that a test may damage; its weights are no weights."""
    folder = tmp_path / "model"
    shutil.copytree(sd1_folder, folder)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"not weights: reading them fails")
    return folder


def edit_unet(folder: Path, **changes: Any) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named_with_the_remedy(broken_folder: Path, part: str) -> None:
    shutil.rmtree(broken_folder / part)
    with pytest.raises(ConfigurationError, match=f"no {part}/.*give the folder of a whole") as info:
        load_components(str(broken_folder), torch.float32)
    assert str(broken_folder) in str(info.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": "text_time"}, "SDXL"),
        ({"in_channels": 9}, "9 input and 4 output"),
        ({"class_embed_type": "projection"}, "class_embed_type 'projection'.*unCLIP"),
        ({"num_class_embeds": 1000}, "num_class_embeds 1000.*class-conditioned"),
        ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type 'image_proj'"),
        ({"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
    ],
)
def test_other_kinds_of_models_are_refused(
    broken_folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_unet(broken_folder, **changes)
    with pytest.raises(ConfigurationError, match=message):
        load_components(str(broken_folder), torch.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        {"prediction_type": "flow_prediction"},
        {"use_flow_sigmas": True},
    ],
)
def test_flow_matching_is_refused_before_weights_load(
    broken_folder: Path, changes: dict[str, Any]
) -> None:
    file = broken_folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigurationError, match=r"_config\.json: prediction_type is .*eps"):
        load_components(str(broken_folder), torch.float32)


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_latents_normalised_by_channel_are_refused(broken_folder: Path, name: str) -> None:
    file = broken_folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: [0.5, 1.0, 1.0, 2.0]}))
    with pytest.raises(ConfigurationError, match=rf"vae/config\.json: {name} is \[0\.5, 1\.0"):
        load_components(str(broken_folder), torch.float32)


def test_a_tokenizer_without_words_is_refused(broken_folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (broken_folder / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(ConfigurationError, match="knows no word"):
        check_model(str(broken_folder))


def test_weights_that_cannot_be_read_are_named(broken_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="its unet cannot be loaded"):
        load_components(str(broken_folder), torch.float32)


def test_a_configuration_that_was_cut_off_is_named(broken_folder: Path) -> None:
    file = broken_folder / "unet" / "config.json"
    file.write_text(file.read_text()[:40])
    with pytest.raises(ConfigurationError, match=r"unet/config\.json is no JSON.*fetch"):
        check_model(str(broken_folder))
    file.write_text("[]")
    with pytest.raises(ConfigurationError, match=r"unet/config\.json holds no configuration"):
        check_model(str(broken_folder))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_weights_that_were_cut_off_are_named(sd1_folder: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd1_folder, folder)
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigurationError, match=f"its {part} cannot be loaded"):
        load_components(str(folder), torch.float32)


def rename_weights(folder: Path, name_of: Callable[[str], str]) -> None:
    (file,) = folder.glob("*.safetensors")
    named = {name_of(name): weight for name, weight in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize(
    ("part", "gone"),
    [
        ("unet", "up_blocks.1.attentions."),
        ("vae", "decoder.conv_out."),
        ("text_encoder", "encoder.layers.1."),
    ],
)
def test_weights_that_are_missing_are_named_not_made_up(
    sd1_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    gone: str,
    accelerate: bool,
) -> None:
    if not accelerate:
        monkeypatch.setattr("diffusers.models.modeling_utils._LOW_CPU_MEM_USAGE_DEFAULT", False)
    folder = tmp_path / "model"
    shutil.copytree(sd1_folder, folder)
    drop_weights(folder / part, gone)
    with pytest.raises(ConfigurationError, match=f"its {part} cannot be loaded .*{gone}") as info:
        load_components(str(folder), torch.float32)
    assert str(folder) in str(info.value)


def test_weights_under_other_names_are_missing(sd1_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd1_folder, folder)
    rename_weights(folder / "text_encoder", lambda name: name.replace("layers.", "blocks."))
    with pytest.raises(ConfigurationError, match=r"its text_encoder .*32 of the .*layers\.0"):
        load_components(str(folder), torch.float32)


def test_text_encoders_are_read_as_older_versions_wrote_them(
    sd1_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd1_folder, folder)
    rename_weights(
        folder / "text_encoder", lambda name: "text_model." + name.removeprefix("text_model.")
    )
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    weights = load_file(file) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    file.unlink()
    torch.save(weights, folder / "text_encoder" / "pytorch_model.bin")
    old = load_components(str(folder), torch.float32).text_encoder.state_dict()
    new = load_components(str(sd1_folder), torch.float32).text_encoder.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in new)


@pytest.mark.parametrize("model", ["no/such/folder", "nowhere", "/tmp/../nothing", ""])
def test_what_is_neither_folder_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ConfigurationError, match="is no folder; give a diffusers folder or a hub"):
        check_model(model)


# diffusers passes huggingface_hub an argument it no longer takes.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_a_hub_id_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(ConfigurationError, match="model nobody/nothing: its unet cannot be loaded"):
        check_model("nobody/nothing")


def test_weights_are_real_whatever_context_lightning_makes_models_in(sd1_folder: Path) -> None:
    with torch.device("meta"):
        parts = load_components(str(sd1_folder), torch.float32)
    for network in (parts.unet, parts.vae, parts.text_encoder):
        assert {weight.device.type for weight in network.parameters()} == {"cpu"}
    assert parts.scheduler.alphas_cumprod.device.type == "cpu"


def test_a_home_folder_is_found(sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(sd1_folder.parent))
    load_components("~/sd1", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_have_the_number_format_asked_for(sd2_folder: Path, dtype: torch.dtype) -> None:
    parts = load_components(str(sd2_folder), dtype)
    for network in (parts.unet, parts.vae, parts.text_encoder):
        assert {weight.dtype for weight in network.parameters()} == {dtype}
    assert parts.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("model", ["sd1_folder", "sdxl_folder"])
def test_every_network_comes_from_the_variants_files(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / "model")
    for weights in folder.rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    kinds = {part.name for part in folder.iterdir() if list(part.glob("*.fp16.safetensors"))}
    assert {"unet", "vae", "text_encoder"} <= kinds
    parts = load_components(str(folder), torch.float32, "fp16")
    assert all(isinstance(getattr(parts, name), torch.nn.Module) for name in kinds)


def test_automatic_number_format_follows_the_device() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
    assert resolve_dtype(torch.float16, torch.device("cpu")) == torch.float16


@pytest.mark.parametrize("dtype", ["fp16", torch.float64])
def test_other_number_formats_are_refused(dtype: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"dtype is .*; give auto, float32"):
        resolve_dtype(dtype, torch.device("cpu"))
