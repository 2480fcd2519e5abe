"""Real but tiny models on disk, shared by the whole suite, and the shape checks of jaxtyping."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

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
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

# fmt: off
WORDS = [
    "a", "photo", "of", "and", "dog", "cat", "car", "person", "bird", "bus", "horse", "sheep",
    "disc", "ring", "zebra", "brick", "block", "potted", "plant", "dining", "table",
]
# fmt: on
TEXT_WIDTH = 16
CONTEXT_LENGTH = 77


def _byte_symbols() -> list[str]:
    """Return the 256 printable stand-ins of bytes that byte-level BPE vocabularies begin with."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]


def _merge_words() -> list[tuple[str, str]]:
    """Return merges that make one token of each of WORDS; any other word falls into letters."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        # From the right: pieces that end a word never take part in another word's prefix.
        tail = pieces[-1]
        for piece in reversed(pieces[:-1]):
            merges[(piece, tail)] = None
            tail = piece + tail
    return list(merges)


def write_tokenizer(folder: Path) -> int:
    """Write a CLIP tokenizer (vocab.json, merges.txt, configuration) and return its size."""
    letters = _byte_symbols()
    merges = _merge_words()
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


def write_text_encoder(folder: Path, vocabulary_size: int) -> None:
    """Write a CLIP text encoder of two layers."""
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,
        pad_token_id=vocabulary_size - 1,
    )
    CLIPTextModel(config).save_pretrained(folder)


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


def write_unet(folder: Path, version: int) -> None:
    """Write a U-Net of three resolutions, shaped like Stable Diffusion 1.x or 2.x."""
    like_version_2 = {
        "attention_head_dim": (1, 2, 2),
        "use_linear_projection": True,
        "upcast_attention": True,
    }
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **(like_version_2 if version == 2 else {"attention_head_dim": 2}),
    ).save_pretrained(folder)


def write_stable_diffusion(folder: Path, version: int) -> Path:
    """Write a whole diffusers folder with random weights (64x64 pixels, 16x16 latents)."""
    with torch.random.fork_rng():
        torch.manual_seed(version)
        vocabulary_size = write_tokenizer(folder / "tokenizer")
        write_text_encoder(folder / "text_encoder", vocabulary_size)
        write_vae(folder / "vae")
        write_unet(folder / "unet", version)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if version == 2:
        scheduler = DDIMScheduler(
            **schedule,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
    else:
        scheduler = PNDMScheduler(**schedule, skip_prk_steps=True, steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder shaped like Stable Diffusion 1.x: epsilon, equal head counts."""
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd1", version=1)


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder shaped like Stable Diffusion 2.x: v prediction, linear projections."""
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd2", version=2)


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
