"""``g4seg demo``: coarse masks in, refined masks out, on scenes nobody has seen."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from g4seg_pl.callbacks.palette import label_image
from g4seg_pl.callbacks.run_record import write_text_atomically
from g4seg_pl.core.background import compose_label
from g4seg_pl.core.refine import RefinementState
from g4seg_pl.evaluation.comparison import Comparison, markdown
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.report import pictures
from g4seg_pl.types import Sample
from g4seg_pl.world.load import load_refiner, load_seed_maker, scenes, with_seeds
from g4seg_pl.world.scenes import CLASS_NAMES
from g4seg_pl.world.settings import PROVENANCE, RECIPES, SEED_BACKGROUND

SHOWN = 8
BATCH = 16


def demo(
    out: Path = Path("outputs/demo"),
    images: int = 100,
    scene_seed: int = 0,
    noise_seed: int = 0,
) -> int:
    """Refine Grad-CAM seeds of test scenes with the embedded diffusion model and score them.

    Writes metrics.json, masks/ (refined label files), seeds/ (label files of the seeds) and
    pictures.png. Where the settings come from is said in metrics.json.

    Args:
        out: the folder to write.
        images: how many test scenes.
        scene_seed: index of the first test scene; any number gives scenes nobody has seen.
        noise_seed: from which all noise derives.

    Returns:
        0, the exit status.
    """
    started = time.perf_counter()
    print(f"drawing {images} test scenes and their Grad-CAM seeds", flush=True)
    samples = with_seeds(scenes("test", images, first=scene_seed), load_seed_maker())
    refiner = load_refiner(noise_seed)
    comparison = Comparison(len(CLASS_NAMES) + 1)
    _score(comparison, "seed", samples, [sample.seed.scores for sample in samples])
    shown: list[Tensor] = []
    for name, steps in RECIPES.items():
        print(f"refining: {name}", flush=True)
        refined = refine_all(refiner.with_steps(steps), samples)
        _score(comparison, name, samples, refined)
        if name == "g4seg":
            shown = refined
    rows = comparison.rows()
    metrics = {
        "n_images": len(samples),
        "split": f"test scenes {scene_seed} to {scene_seed + images - 1}",
        "seeds": "Grad-CAM of the embedded CLIP",
        "background_rule": repr(SEED_BACKGROUND),
        "settings": PROVENANCE,
        "truth_255": "none in these scenes",
        "crf": "off",
        "gain_se": "bootstrap over images, paired",
        "seconds": round(time.perf_counter() - started, 1),
        "rows": [asdict(row) for row in rows],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    _write_labels(out / "seeds", samples, [sample.seed.scores for sample in samples])
    _write_labels(out / "masks", samples, shown)
    sheet = show(refiner.with_steps(RECIPES["g4seg"]), samples[:SHOWN], shown[:SHOWN])
    sheet.save(out / "pictures.png")
    print(f"\n{metrics['split']}; mIoU in percent; gain over the seed ± standard error\n")
    print(markdown(rows))
    print(f"\n{out}/: metrics.json, pictures.png, masks/, seeds/")
    return 0


def refine_all(refiner: G4SegRefiner, samples: Sequence[Sample]) -> list[Tensor]:
    """Refined foreground of all samples, a batch of images at a time."""
    refined: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(samples), BATCH):
            refined += refiner.refine_samples(samples[start : start + BATCH])
    return refined


def show(
    refiner: G4SegRefiner, samples: Sequence[Sample], refined: Sequence[Tensor]
) -> Image.Image:
    """A sheet: image, truth, seed, refined, what the model generated, what changed."""
    rows = []
    for sample, foreground in zip(samples, refined, strict=True):
        generated: list[Tensor] = []

        def keep(state: RefinementState, kept: list[Tensor] = generated) -> None:
            if "generated" in state.artifacts:
                kept.append(state.artifacts["generated"])

        with torch.no_grad():
            refiner.refine_samples([sample], keep)
        rows.append(_row(sample, foreground, generated))
    titles = ("image", "truth", "seed", "refined", "generated", "what changed")
    return pictures.grid(rows, titles)


def _row(sample: Sample, foreground: Tensor, generated: list[Tensor]) -> list[Image.Image]:
    image, truth = sample.image.permute(1, 2, 0).numpy(), truth_of(sample)
    before, after = _label(sample, sample.seed.scores), _label(sample, foreground)
    made = generated[-1][0] if generated else sample.image.float() / 127.5 - 1
    picture = ((made + 1) * 127.5).clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return [
        Image.fromarray(image),
        pictures.overlay(image, truth),
        pictures.overlay(image, before),
        pictures.overlay(image, after),
        Image.fromarray(picture),
        pictures.change(before, after, truth),
    ]


def truth_of(sample: Sample) -> NDArray[np.uint8]:
    """The truth of a scene, uint8 ``(H, W)``.

    Raises:
        ValueError: the sample was read without truth.
    """
    if sample.truth is None:
        message = f"{sample.image_id} was read without truth"
        raise ValueError(message)
    return sample.truth.numpy()


def _label(sample: Sample, foreground: Tensor) -> NDArray[np.uint8]:
    return compose_label(foreground, sample.seed.class_ids, SEED_BACKGROUND).numpy()


def _score(
    comparison: Comparison, name: str, samples: Sequence[Sample], foreground: Sequence[Tensor]
) -> None:
    for sample, soft in zip(samples, foreground, strict=True):
        comparison.add(name, _label(sample, soft), truth_of(sample))


def _write_labels(folder: Path, samples: Sequence[Sample], foreground: Sequence[Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for sample, soft in zip(samples, foreground, strict=True):
        label_image(_label(sample, soft)).save(folder / f"{sample.image_id}.png")
