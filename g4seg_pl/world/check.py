"""The gates: is the embedded world good enough to say anything about the method?

``python -m g4seg_pl.world.check`` measures on held-out scenes, prints a table, writes gates.json
and a grid of samples, and exits 1 while a gate is missed.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.core.diffusion import add_noise
from g4seg_pl.core.grounding import cross_attention_map
from g4seg_pl.seeds.clip_model import encode_texts, load_clip
from g4seg_pl.world.classifier import SceneClassifier
from g4seg_pl.world.data import held_out
from g4seg_pl.world.folders import CLIP, WEIGHTS
from g4seg_pl.world.load import load_seed_maker
from g4seg_pl.world.load import scenes as scene_samples
from g4seg_pl.world.scenes import CLASS_NAMES

# Far from the scenes of demo and laboratory, which begin at 0.
FIRST = 500_000
# Pixels of a class in a scene of 64×64.
SMALL = 240
PROMPTS = tuple(f"a photo of {name}" for name in CLASS_NAMES)


@dataclass(frozen=True)
class Gate:
    """One measured figure beside its bar."""

    name: str
    value: float
    bar: float
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the bar is reached."""
        return self.value >= self.bar


@torch.inference_mode()
def autoencoder_gates(generator: StableDiffusion, judge: SceneClassifier) -> list[Gate]:
    """PSNR, and the judge's recall on reconstructions over that on originals."""
    images, masks, presence = held_out("val", 300, first=FIRST)
    decoded = generator.decode(generator.encode(images))
    error = ((decoded - images) / 2).square().mean((1, 2, 3))
    recalls = [recall(judge, each, presence) for each in (images, decoded)]
    psnr = float((-10 * error.log10()).mean())
    labels = range(1, presence.shape[1] + 1)
    area = torch.stack([(masks == label).sum((1, 2)) for label in labels], dim=1)
    small = [recall(judge, each, presence * (area < SMALL)) for each in (images, decoded)]
    detail = (
        f"{recalls[1]:.3f} on reconstructions, {recalls[0]:.3f} on originals; of classes below "
        f"{SMALL} pixels {small[1]:.3f} and {small[0]:.3f}"
    )
    return [
        Gate("VAE PSNR, dB", psnr, 26.0, "300 scenes"),
        Gate("VAE recall kept", recalls[1] / recalls[0], 0.9, detail),
    ]


def recall(judge: SceneClassifier, images: Tensor, presence: Tensor) -> float:
    """Share of the classes present in images ``(B, 3, S, S)`` that the judge finds."""
    return float(((judge(images) > 0) * presence).sum() / presence.sum())


@torch.inference_mode()
def sample(
    generator: StableDiffusion,
    prompts: tuple[str, ...],
    steps: int = 30,
    guidance: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """DDIM samples of prompts, images ``(B, 3, S, S)`` in [-1, 1]."""
    levels = generator.alphas_cumprod
    times = [int(t) for t in torch.linspace(len(levels) - 1, 0, steps + 1).round()]
    side = generator.image_size // 4
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(prompts), 4, side, side, generator=draw)
    named, empty = generator.embed(prompts), generator.embed([""] * len(prompts))
    for now, then in pairwise(times):
        free = generator.denoise(latents, now, empty)
        noise = free + guidance * (generator.denoise(latents, now, named) - free)
        clean = (latents - (1 - levels[now]).sqrt() * noise) / levels[now].sqrt()
        latents = levels[then].sqrt() * clean + (1 - levels[then]).sqrt() * noise
    return generator.decode(clean)


def text_gate(generator: StableDiffusion, judge: SceneClassifier, picture: Path | None) -> Gate:
    """How often the judge finds the prompted class in a sample.

    Beside it, what a perfect generator would reach: how often it finds the one object of a scene,
    as drawn and through the autoencoder.
    """
    each = 10
    samples = [sample(generator, PROMPTS, seed=seed) for seed in range(each)]
    with torch.inference_mode():
        found = torch.stack([judge(images).diagonal() > 0 for images in samples]).float()
        single, _, presence = held_out("val", 150, max_objects=1, first=FIRST)
        drawn = recall(judge, single, presence)
        coded = recall(judge, generator.decode(generator.encode(single)), presence)
    if picture is not None:
        rows = [torch.cat(list(images), dim=2) for images in samples[:6]]
        grid = ((torch.cat(rows, dim=1) + 1) * 127.5).round().byte().permute(1, 2, 0)
        picture.parent.mkdir(parents=True, exist_ok=True)
        side = Image.fromarray(grid.numpy())
        side.resize((side.width * 2, side.height * 2), Image.Resampling.NEAREST).save(picture)
    worst = CLASS_NAMES[int(found.mean(0).argmin())]
    detail = (
        f"{12 * each} samples, 30 DDIM steps, guidance 3; worst class {worst}; it is found in "
        f"{drawn:.3f} of single-object scenes, {coded:.3f} of their reconstructions"
    )
    return Gate("text is heard", float(found.mean()), 0.85, detail)


@torch.inference_mode()
def diffusion_classifier_gate(generator: StableDiffusion, scenes: int, draws: int = 32) -> Gate:
    """How often the true class has the lowest denoising loss, under noise common to classes."""
    images, _, presence = held_out("val", scenes, max_objects=1, first=FIRST)
    latents, words = generator.encode(images), generator.embed(PROMPTS)
    times = torch.linspace(100, 900, draws).round().int().tolist()
    right = 0
    for index, latent in enumerate(latents):
        draw = torch.Generator().manual_seed(index)
        losses = torch.zeros(len(PROMPTS))
        for time in times:
            noise = torch.randn(1, *latent.shape, generator=draw)
            noisy = add_noise(latent[None], noise, generator.alphas_cumprod, time)
            output = generator.denoise(noisy.expand(len(PROMPTS), -1, -1, -1), time, words)
            losses += (output - noise).square().mean((1, 2, 3))
        right += int(presence[index, losses.argmin()].item())
    detail = f"{scenes} single-object scenes, {draws} draws at t = 100..900"
    return Gate("diffusion classifier", right / scenes, 0.70, detail)


@torch.inference_mode()
def grounding_gate(generator: StableDiffusion, scenes: int, timestep: int = 200) -> Gate:
    """How often the class tokens' cross-attention is strongest inside the object.

    Averaged over heads and layers, each resolution counting the same.
    """
    images, masks, presence = held_out("val", scenes, max_objects=1, first=FIRST)
    draw = torch.Generator().manual_seed(0)
    latents = generator.encode(images)
    noise = torch.randn(latents.shape, generator=draw)
    noisy = add_noise(latents, noise, generator.alphas_cumprod, timestep)
    names = [CLASS_NAMES[int(k)] for k in presence.argmax(1)]
    prompts = [f"a photo of {name}" for name in names]
    _, cross = generator.attention(noisy, timestep, generator.embed(prompts))
    tokens = torch.stack([generator.token_mask(p, n) for p, n in zip(prompts, names, strict=True)])
    maps = cross_attention_map(cross, tokens, weights=(1.0, 1.0, 1.0))
    detail = f"{scenes} single-object scenes, t = {timestep}"
    return Gate("grounding", _peaks_inside(maps, masks), 0.75, detail)


def _peaks_inside(maps: Tensor, masks: Tensor) -> float:
    """Share of maps ``(N, h, w)`` whose largest value lies on the object of ``(N, H, W)``."""
    side = masks.shape[-1]
    full = F.interpolate(maps[:, None].float(), (side, side), mode="bilinear")[:, 0]
    best = full.flatten(1).argmax(1)
    return float((masks.flatten(1).gather(1, best[:, None]) > 0).float().mean())


def clip_gates(scenes: int) -> list[Gate]:
    """Zero-shot classification, and where Grad-CAM peaks, on single-object scenes."""
    images, masks, presence = held_out("val", scenes, max_objects=1, first=FIRST)
    maker = load_seed_maker()
    samples = scene_samples("val", scenes, first=FIRST, max_objects=1)
    with torch.no_grad():
        maps = torch.cat([maker.make(sample).foreground for sample in samples])
        clip, tokenizer = load_clip(str(CLIP))
        texts = encode_texts(clip, tokenizer, CLASS_NAMES, ["a photo of {}"])
        encoder: Any = clip
        seen = F.normalize(encoder.encode_image(images), dim=-1)
        best = (seen @ texts.T).argmax(1)
    top1 = float(presence.gather(1, best[:, None]).mean())
    detail = f"{scenes} single-object scenes"
    return [
        Gate("CLIP zero-shot top-1", top1, 0.90, detail),
        Gate("Grad-CAM peak inside", _peaks_inside(maps, masks), 0.75, detail),
    ]


def load_judge(folder: Path = WEIGHTS) -> SceneClassifier:
    """The recipe's classifier from the repository."""
    from safetensors.torch import load_file

    judge = SceneClassifier().eval().requires_grad_(False)
    judge.load_state_dict(load_file(folder / "judge" / "model.safetensors"))
    return judge


def report(gates: list[Gate]) -> str:
    """The gates as a Markdown table."""
    rows = [
        f"| {gate.name} | {gate.value:.3f} | ≥ {gate.bar:g} | "
        f"{'yes' if gate.passed else 'NO'} | {gate.detail} |"
        for gate in gates
    ]
    return "\n".join(["| gate | measured | bar | passed | how |", "|---|---|---|---|---|", *rows])


def main() -> int:
    """Measure, print, write; 1 while a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--json", type=Path, default=Path("outputs/world/gates.json"))
    parser.add_argument("--scenes", type=int, default=150, help="single-object scenes")
    parser.add_argument("--only", choices=["vae", "text", "classifier", "grounding", "clip"])
    options = parser.parse_args()
    judge = load_judge(options.weights)
    generator = StableDiffusion.from_pretrained(str(options.weights / "generator"))
    picture = options.json.with_name("samples.png")
    measures: dict[str, Callable[[], list[Gate]]] = {
        "vae": lambda: autoencoder_gates(generator, judge),
        "text": lambda: [text_gate(generator, judge, picture)],
        "classifier": lambda: [diffusion_classifier_gate(generator, options.scenes)],
        "grounding": lambda: [grounding_gate(generator, options.scenes)],
        "clip": lambda: clip_gates(options.scenes),
    }
    chosen = [options.only] if options.only else list(measures)
    gates = [gate for name in chosen for gate in measures[name]()]
    print(report(gates))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(gate) | {"passed": gate.passed} for gate in gates]
    options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0 if all(gate.passed for gate in gates) else 1


if __name__ == "__main__":
    raise SystemExit(main())
