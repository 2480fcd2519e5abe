"""From the recipe's checkpoints to the folders that Stable Diffusion and open_clip users know."""

import argparse
import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from g4seg_pl.world.clip import PREPROCESS, clip_config
from g4seg_pl.world.data import DEFAULT_CACHE
from g4seg_pl.world.folders import WEIGHTS
from g4seg_pl.world.text import write_tokenizer
from g4seg_pl.world.tiny import TinyDecoderTask
from g4seg_pl.world.train import classifier_weights, load_tokenizer, load_vae
from g4seg_pl.world.unet import MODEL_INDEX, TextToLatent, build_scheduler


def averaged_model(out: Path, tokenizer: CLIPTokenizer) -> TextToLatent:
    """The averaged U-Net and text encoder of the last checkpoint."""
    checkpoint = torch.load(out / "unet" / "last.ckpt", weights_only=True)
    model = TextToLatent(tokenizer)
    prefix = "average.module."
    state = {
        name.removeprefix(prefix): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    model.load_state_dict(state)
    return model


def export_generator(out: Path, scaling_factor: float, target: Path) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained`` loads.

    Args:
        out: the recipe's folder of checkpoints.
        scaling_factor: brings latents to deviation 1.
        target: the folder to write; weights of the U-Net are stored as float16.
    """
    tokenizer = load_tokenizer(out)
    vae: AutoencoderKL = load_vae(out)
    vae.register_to_config(scaling_factor=scaling_factor)
    vae.save_pretrained(target / "vae")
    model = averaged_model(out, tokenizer)
    model.unet.set_attn_processor(AttnProcessor2_0())
    model.unet.half().save_pretrained(target / "unet")
    model.text_encoder.save_pretrained(target / "text_encoder")
    write_tokenizer(target / "tokenizer")  # with vocab.json and merges.txt, for older readers
    build_scheduler().save_pretrained(target / "scheduler")
    text = json.dumps(MODEL_INDEX, indent=2) + "\n"
    (target / "model_index.json").write_text(text, encoding="utf-8")


def export_clip(out: Path, target: Path) -> None:
    """Write open_clip's local folder: configuration, weights and tokenizer."""
    tokenizer = load_tokenizer(out)
    state = torch.load(out / "clip" / "last.ckpt", weights_only=True)["state_dict"]
    weights: dict[str, Tensor] = {
        name.removeprefix("clip."): weight.contiguous()
        for name, weight in state.items()
        if name.startswith("clip.") and not name.endswith("attn_mask")
    }
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / "open_clip_model.safetensors")
    config = {"model_cfg": clip_config(len(tokenizer)), "preprocess_cfg": PREPROCESS}
    text = json.dumps(config, indent=2) + "\n"
    (target / "open_clip_config.json").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(target)


def export_classifier(out: Path, name: Literal["teacher", "judge"], target: Path) -> None:
    """Write one of the recipe's classifiers."""
    target.mkdir(parents=True, exist_ok=True)
    weights = {key: weight.contiguous() for key, weight in classifier_weights(out, name).items()}
    save_file(weights, target / "model.safetensors")


def export_tiny(out: Path, target: Path) -> None:
    """Write a folder that ``AutoencoderTiny.from_pretrained`` loads, the last checkpoint's."""
    task = TinyDecoderTask()
    task.load_state_dict(torch.load(out / "tiny" / "last.ckpt", weights_only=True)["state_dict"])
    task.tiny.save_pretrained(target)


def main() -> None:
    """Fill the package's weights: ``python -m g4seg_pl.world.export generator`` and the like."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("what", choices=["teacher", "judge", "clip", "generator", "tiny"])
    parser.add_argument("--out", type=Path, default=Path("outputs/world/train"))
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--target", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    if options.what in ("teacher", "judge"):
        export_classifier(options.out, options.what, options.target / options.what)
        return
    if options.what == "clip":
        export_clip(options.out, options.target / "clip")
        return
    if options.what == "tiny":
        export_tiny(options.out, options.target / "tiny_decoder")
        return
    scale = json.loads((options.cache / "scaling_factor.json").read_text())["scaling_factor"]
    export_generator(options.out, scale, options.target / "generator")


if __name__ == "__main__":
    main()
