"""Dense features against each library's own forward pass, at trained and at other sizes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cut_weights import drop_weights
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from g4seg_pl.core.protocols import FeatureExtractor
from g4seg_pl.features.base import (
    CLIP_MEAN,
    CLIP_STD,
    DenseFeatures,
    fit_to_patches,
    interpolate_positions,
)
from g4seg_pl.features.open_clip import OpenClipFeatures
from g4seg_pl.features.transformers_clip import TransformersClipFeatures
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.types import ConfigurationError

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vision"
    config = CLIPVisionConfig(**VISION, projection_dim=12)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(sd1_folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(sd1_folder, subfolder="vae").eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


MAKERS: list[Callable[[Path, Path], DenseFeatures]] = [
    lambda clip, vision: OpenClipFeatures(str(clip)),
    lambda clip, vision: OpenClipFeatures(str(clip), layer=0, projected=False, image_size=48),
    lambda clip, vision: TransformersClipFeatures(str(vision)),
    lambda clip, vision: TransformersClipFeatures(str(vision), layer=-2, image_size=48),
    lambda clip, vision: VAEFeatures(),
    lambda clip, vision: VAEFeatures(level=1, image_size=24),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("size", [(32, 32), (40, 72), (33, 47)])
def test_any_extractor_takes_any_size_and_number_format(
    make: Callable[[Path, Path], DenseFeatures],
    size: tuple[int, int],
    clip_folder: Path,
    vision_folder: Path,
    sd1_folder: Path,
) -> None:
    features = make(clip_folder, vision_folder)
    assert isinstance(features, FeatureExtractor)
    assert isinstance(features, nn.Module)
    assert not list(features.parameters())
    vae = AutoencoderKL.from_pretrained(sd1_folder, subfolder="vae").eval()
    features.load(vae)
    assert not any(weight.requires_grad for weight in features.parameters())
    assert not any(module.training for module in features.children())
    images = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        exact = features(images)
        assert exact.dtype == torch.float32
        assert len(exact) == 2
        # The grid follows the image's aspect.
        assert (exact.shape[2] == exact.shape[3]) == (size[0] == size[1])
        vae.to(torch.bfloat16)
        rough = features.to(torch.bfloat16)(images)
    assert rough.dtype == torch.float32
    similarity = nn.functional.cosine_similarity(rough.flatten(), exact.flatten(), dim=0)
    assert similarity > 0.99


def test_open_clip_tokens_are_its_own(clip_folder: Path, images: Tensor) -> None:
    import open_clip

    features = OpenClipFeatures(str(clip_folder))
    features.load()
    model = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    model.visual.output_tokens = True
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        _, tokens = model.visual(((images + 1) / 2 - mean) / std)
        expected = (tokens @ model.visual.proj).transpose(1, 2).view(2, -1, 4, 4)
        torch.testing.assert_close(features(images), expected, rtol=1e-4, atol=1e-5)


def test_transformers_tokens_are_its_own_before_the_norm(
    vision_folder: Path, images: Tensor
) -> None:
    features = TransformersClipFeatures(str(vision_folder), projected=False)
    features.load()
    model = CLIPVisionModelWithProjection.from_pretrained(vision_folder).eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        tokens = model(((images + 1) / 2 - mean) / std).last_hidden_state[:, 1:]
        expected = tokens.transpose(1, 2).view(2, -1, 4, 4)
        torch.testing.assert_close(features(images), expected, rtol=1e-4, atol=1e-5)


def test_transformers_normalisation_is_the_folders_own(
    vision_folder: Path, tmp_path: Path, images: Tensor
) -> None:
    folder = tmp_path / "vision"
    shutil.copytree(vision_folder, folder)
    config = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    own, usual = TransformersClipFeatures(str(folder)), TransformersClipFeatures(str(vision_folder))
    own.load()
    usual.load()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        # What the one calls x is (x + 1)/2 normalised by the other's numbers.
        same = usual((images * std + mean) * 2 - 1)
        torch.testing.assert_close(own(images), same, rtol=1e-4, atol=1e-5)


def test_the_last_hidden_features_of_the_autoencoder_lead_to_its_latent(
    vae: AutoencoderKL, images: Tensor
) -> None:
    features = VAEFeatures()
    features.load(vae)
    encoder = vae.encoder
    with torch.no_grad():
        hidden = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(features(images))))
        expected = vae.encode(images).latent_dist.mode()
        found = vae.quant_conv(hidden).chunk(2, dim=1)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Shared, not owned: nothing is registered twice.
    assert not list(features.parameters())


@pytest.mark.parametrize("level", [0, -1])
def test_the_autoencoder_takes_few_large_pictures_at_once(
    vae: AutoencoderKL, images: Tensor, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = VAEFeatures(level)
    features.load(vae)
    many = torch.cat([images, images.flip(3), images[:1].flip(2)])
    with torch.no_grad():
        expected = features(many)
        monkeypatch.setattr("g4seg_pl.core.layout._PIXELS", 2 * 32 * 32)
        entered: list[int] = []
        handle = vae.encoder.conv_in.register_forward_hook(
            lambda _, inputs, __: entered.append(len(inputs[0]))
        )
        found = features(many)
    handle.remove()
    assert entered == [2, 2, 1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_positions_on_another_grid() -> None:
    positions = torch.randn(1 + 12, 5)
    assert interpolate_positions(positions, (3, 4), (3, 4)) is positions
    larger = interpolate_positions(positions, (3, 4), (6, 4))
    assert larger.shape == (1 + 24, 5)
    assert torch.equal(larger[0], positions[0])
    level = torch.cat([positions[:1], positions[1:2].expand(12, -1)])
    flat = interpolate_positions(level, (3, 4), (7, 2))[1:]
    torch.testing.assert_close(flat, positions[1:2].expand(14, -1))


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((32, 48), None, (32, 48)),
        ((33, 46), None, (32, 48)),
        ((3, 5), None, (8, 8)),
        ((32, 48), 64, (64, 96)),
        ((50, 30), 16, (24, 16)),
    ],
)
def test_images_are_fitted_to_whole_patches(
    size: tuple[int, int], side: int | None, expected: tuple[int, int]
) -> None:
    assert fit_to_patches(torch.zeros(1, 3, *size), (8, 8), side).shape[2:] == expected


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (OpenClipFeatures("ViT-B-16"), "`pretrained` is not given"),
        (OpenClipFeatures("ViT-none", "openai"), "open_clip cannot load ViT-none"),
        (TransformersClipFeatures("/no/such/folder"), "cannot load /no/such/folder"),
        (VAEFeatures(), "needs the generator's autoencoder"),
    ],
)
def test_models_that_cannot_be_loaded_are_named(features: DenseFeatures, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        features.load()


@pytest.mark.parametrize(
    "network",
    [
        lambda: Dinov2Model(Dinov2Config(**VISION)),
        lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
    ],
)
def test_another_kind_of_model_is_refused_not_filled_with_random_weights(
    tmp_path: Path, network: Callable[[], PreTrainedModel]
) -> None:
    network().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=f"cannot load {tmp_path} as CLIP: .* not in its"):
        TransformersClipFeatures(str(tmp_path)).load()


def test_an_image_tower_without_projection_gives_only_tokens_before_it(
    vision_folder: Path, tmp_path: Path, images: Tensor
) -> None:
    folder = tmp_path / "vision"
    shutil.copytree(vision_folder, folder)
    drop_weights(folder, "visual_projection.")
    with pytest.raises(ConfigurationError, match=r"1 of .*shape: visual_projection\.weight;"):
        TransformersClipFeatures(str(folder)).load()
    part = TransformersClipFeatures(str(folder), projected=False)
    whole = TransformersClipFeatures(str(vision_folder), projected=False)
    part.load()
    whole.load()
    with torch.no_grad():
        assert torch.equal(part(images), whole(images))


def test_the_image_tower_of_a_whole_clip_is_taken(vision_folder: Path, tmp_path: Path) -> None:
    text = CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    config = {"text_config": text.to_dict(), "vision_config": VISION | {"projection_dim": 12}}
    config["projection_dim"] = 12
    whole = CLIPModel(CLIPModel.config_class(**config))
    whole.save_pretrained(tmp_path)
    features = TransformersClipFeatures(str(tmp_path))
    features.load()
    assert torch.equal(features.network.visual_projection.weight, whole.visual_projection.weight)


def test_a_folder_without_weights_is_named(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copy(clip_folder / "open_clip_config.json", tmp_path)
    with pytest.raises(ConfigurationError, match=r"has no open_clip_model\.safetensors"):
        OpenClipFeatures(str(tmp_path)).load()


def test_layers_that_do_not_exist_are_refused(
    clip_folder: Path, vision_folder: Path, vae: AutoencoderKL
) -> None:
    with pytest.raises(ConfigurationError, match=r"layer is 2; .* has 2 layers"):
        OpenClipFeatures(str(clip_folder), layer=2).load()
    with pytest.raises(ConfigurationError, match=r"layer is -4; .* has 3 layers"):
        TransformersClipFeatures(str(vision_folder), layer=-4).load()
    with pytest.raises(ConfigurationError, match="level is 3; give -1 to 2"):
        VAEFeatures(level=3).load(vae)


def test_a_tower_that_is_no_transformer_is_refused(tmp_path: Path) -> None:
    from open_clip.model import CLIP

    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": {"vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
    }
    weights = {name: w.contiguous() for name, w in CLIP(**model).state_dict().items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    with pytest.raises(ConfigurationError, match=r"ModifiedResNet.*give a ViT"):
        OpenClipFeatures(str(tmp_path)).load()


def test_weights_are_real_whatever_context_lightning_makes_models_in(vision_folder: Path) -> None:
    features = TransformersClipFeatures(str(vision_folder))
    with torch.device("meta"):
        features.load()
    assert {weight.device.type for weight in features.network.parameters()} == {"cpu"}
