"""Real but tiny models on disk, shared by the whole suite, and the shape checks of jaxtyping."""

import gc
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
from jaxtyping import install_import_hook

# Nothing here may reach for the network: a test that does is wrong.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny networks gain nothing from a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shapes in signatures are checked under pytest only; this must precede the first import of ours.
sys.path.insert(0, str(Path(__file__).parent))
install_import_hook(
    ["g4seg_pl.core", "g4seg_pl.backbones", "g4seg_pl.features", "g4seg_pl.seeds"],
    "shape_checks.check" if find_spec("beartype") else None,
)

import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from hypothesis import settings  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

# A busy machine is no failure of what is tested.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """Keep what is imported out of collections of garbage, which took a second each with it."""
    gc.collect()
    gc.freeze()


Version = Literal[1, 2, "lcm", "xl"]

# fmt: off
WORDS = [
    "a", "photo", "of", "and", "dog", "cat", "car", "person", "bird", "bus", "horse", "sheep",
    "disc", "ring", "zebra", "brick", "block", "potted", "plant", "dining", "table",
]
# fmt: on
TEXT_WIDTH = 16
CONTEXT_LENGTH = 77
POOLED_WIDTH = 12


def _byte_symbols() -> list[str]:
    """Return the 256 printable stand-ins of bytes that byte-level BPE vocabularies begin with."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]


def _merge_words(words: list[str]) -> list[tuple[str, str]]:
    """Return merges that make one token of each word; any other word falls into letters."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        # From the right: pieces that end a word never take part in another word's prefix.
        tail = pieces[-1]
        for piece in reversed(pieces[:-1]):
            merges[(piece, tail)] = None
            tail = piece + tail
    return list(merges)


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> int:
    """Write a CLIP tokenizer (vocab.json, merges.txt, configuration) and return its size."""
    letters = _byte_symbols()
    merges = _merge_words(words)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def text_config(vocabulary_size: int) -> CLIPTextConfig:
    """Return the configuration of a CLIP text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        projection_dim=POOLED_WIDTH,
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,
        pad_token_id=vocabulary_size - 1,
    )


def write_vae(folder: Path) -> None:
    """Write an autoencoder that shrinks a side four times, to four channels."""
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
    ).save_pretrained(folder)


UNET = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
# Six numbers of a picture's size, each as a vector, and the pooled text beside them.
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED_WIDTH,
}


def write_unet(folder: Path, version: Version) -> None:
    """Write a U-Net of three resolutions, shaped like the given version's."""
    own: dict[Version, dict[str, Any]] = {
        1: {"attention_head_dim": 2},
        2: {
            "attention_head_dim": (1, 2, 2),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "lcm": {"attention_head_dim": 2, "time_cond_proj_dim": 10},
        "xl": XL,
    }
    UNet2DConditionModel(**(UNET | own[version])).save_pretrained(folder)


def write_stable_diffusion(folder: Path, version: Version) -> Path:
    """Write a whole diffusers folder with random weights (64x64 pixels, 16x16 latents)."""
    with torch.random.fork_rng():
        torch.manual_seed({"lcm": 4, "xl": 5}.get(version, version))
        vocabulary_size = write_tokenizer(folder / "tokenizer")
        CLIPTextModel(text_config(vocabulary_size)).save_pretrained(folder / "text_encoder")
        write_vae(folder / "vae")
        write_unet(folder / "unet", version)
        if version == "xl":
            # Another vocabulary, so that the two tokenizers do not agree about "zebra".
            vocabulary_size = write_tokenizer(folder / "tokenizer_2", WORDS[:12])
            second = CLIPTextModelWithProjection(text_config(vocabulary_size))
            second.save_pretrained(folder / "text_encoder_2")
    scheduler = write_scheduler(folder / "scheduler", version)
    write_index(folder, version, type(scheduler).__name__)
    return folder


def write_scheduler(folder: Path, version: Version) -> Any:
    """Write and return the sampler that the version's models are published with."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler: Any
    match version:
        case 1:
            scheduler = PNDMScheduler(**schedule, skip_prk_steps=True, steps_offset=1)
        case 2:
            scheduler = DDIMScheduler(
                **schedule,
                prediction_type="v_prediction",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            )
        case "lcm":
            scheduler = LCMScheduler(**schedule)
        case "xl":
            scheduler = EulerDiscreteScheduler(
                **schedule, timestep_spacing="leading", steps_offset=1
            )
    scheduler.save_pretrained(folder)
    return scheduler


def write_index(folder: Path, version: Version, scheduler: str) -> None:
    """Write model_index.json."""
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if version == "xl":
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "image_encoder": [None, None],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    else:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
        if version == "lcm":
            index["_class_name"] = "LatentConsistencyModelPipeline"
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def write_controlnet(folder: Path, model: Path) -> Path:
    """Write a ControlNet for a model's U-Net that answers to any picture."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
        # Three sizes: the picture is four times the latent, as it is for the autoencoder above.
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8))
        for name, weight in net.named_parameters():
            if "controlnet_" in name:  # a new ControlNet says nothing: these begin as zeros
                torch.nn.init.normal_(weight, std=0.2)
    net.save_pretrained(folder)
    return folder


def write_tiny_decoder(folder: Path, **options: Any) -> Path:
    """Write an AutoencoderTiny for the latents of ``write_vae``, its pictures beyond [-1, 1]."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(4, 4, 4),
            num_encoder_blocks=(0, 0, 0),
            decoder_block_out_channels=(8, 8, 8),
            num_decoder_blocks=(1, 1, 1),
            **options,
        )
        torch.nn.init.normal_(tiny.decoder.layers[-1].weight, std=0.5)
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderTiny that decodes any of these models' latents."""
    return write_tiny_decoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder shaped like Stable Diffusion 1.x: epsilon, equal head counts."""
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd1", version=1)


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder shaped like Stable Diffusion 2.x: v prediction, linear projections."""
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd2", version=2)


@pytest.fixture(scope="session")
def lcm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a latent consistency model with the layout of version 1.x."""
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "lcm", version="lcm")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder shaped like SDXL's base: two text encoders, pooled text, sizes."""
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sdxl", version="xl")


@pytest.fixture(scope="session")
def controlnet_folder(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path) -> Path:
    """A ControlNet for ``sd1_folder``."""
    return write_controlnet(tmp_path_factory.mktemp("models") / "controlnet", sd1_folder)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip model (ViT, 32x32 pixels, patches of 8) in its local-folder format."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models") / "clip"
    folder.mkdir()
    model = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    preprocess = {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        weights = CLIP(**model).state_dict()
    tensors = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
