"""``g4seg demo``: coarse masks in, refined masks out, on scenes nobody has seen."""

import json
import time
from collections.abc import Mapping, Sequence
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
from g4seg_pl.world.settings import BACKGROUNDS, PROVENANCE, RECIPES

Label = NDArray[np.uint8]
SHOWN = 8
BATCH = 16


def demo(
    out: Path = Path("outputs/demo"),
    images: int = 300,
    scene_seed: int = 0,
    noise_seed: int = 0,
) -> int:
    """Refine Grad-CAM seeds of test scenes with the embedded diffusion model and score them.

    Writes metrics.json, label files of the seeds (seeds/), of the best recipe (masks/) and of the
    paper's method (masks_paper/), and pictures.png. Where the settings come from is said in
    metrics.json.

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
    refined = {"seed": [sample.seed.scores for sample in samples]}
    for name, steps in RECIPES.items():
        print(f"refining: {name}", flush=True)
        refined[name] = refine_all(refiner.with_steps(steps), samples)
    labels = {name: _labels(name, samples, maps) for name, maps in refined.items()}
    for name, found in labels.items():
        for label, sample in zip(found, samples, strict=True):
            comparison.add(name, label, truth_of(sample))
    rows = comparison.rows()
    metrics = {
        "n_images": len(samples),
        "split": f"test scenes {scene_seed} to {scene_seed + images - 1}",
        "seeds": "Grad-CAM of the embedded CLIP",
        "background_rule": {name: repr(rule) for name, rule in BACKGROUNDS.items()},
        "settings": PROVENANCE,
        "truth_255": "none in these scenes",
        "crf": "off",
        "gain_se": "bootstrap over images, paired",
        "seconds": round(time.perf_counter() - started, 1),
        "rows": [asdict(row) for row in rows],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for folder, name in (("seeds", "seed"), ("masks", "g4seg-best"), ("masks_paper", "g4seg")):
        _write_labels(out / folder, samples, labels[name])
    show(refiner, samples[:SHOWN], labels).save(out / "pictures.png")
    print(f"\n{metrics['split']}; mIoU in percent; gain over the seed ± standard error\n")
    print(markdown(rows))
    print(f"\n{out}/: metrics.json, pictures.png, masks/, masks_paper/, seeds/")
    return 0


def refine_all(refiner: G4SegRefiner, samples: Sequence[Sample]) -> list[Tensor]:
    """Refined foreground of all samples, a batch of images at a time."""
    refined: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(samples), BATCH):
            refined += refiner.refine_samples(samples[start : start + BATCH])
    return refined


def show(
    refiner: G4SegRefiner, samples: Sequence[Sample], labels: Mapping[str, Sequence[Label]]
) -> Image.Image:
    """A sheet: image, truth, seed, what the model generated, both results, what changed.

    Args:
        refiner: of the models that refined.
        samples: the first scenes.
        labels: of ``seed``, ``g4seg`` and ``g4seg-best``, the same scenes first.
    """
    paper = refiner.with_steps(RECIPES["g4seg"])
    rows = []
    for index, sample in enumerate(samples):
        image, truth = sample.image.permute(1, 2, 0).numpy(), truth_of(sample)
        seed, refined, best = (labels[name][index] for name in ("seed", "g4seg", "g4seg-best"))
        cells = [
            Image.fromarray(image),
            pictures.overlay(image, truth),
            pictures.overlay(image, seed),
            Image.fromarray(_generated(paper, sample)),
            pictures.overlay(image, refined),
            pictures.overlay(image, best),
            pictures.change(seed, best, truth),
        ]
        rows.append(cells)
    titles = ("image", "truth", "seed", "generated", "g4seg", "g4seg-best", "best changed")
    return pictures.grid(rows, titles)


def _generated(refiner: G4SegRefiner, sample: Sample) -> Label:
    """What the model draws of the sample's first class under its coarse mask, ``(H, W, 3)``."""
    kept: list[Tensor] = []

    def keep(state: RefinementState) -> None:
        if "generated" in state.artifacts:
            kept.append(state.artifacts["generated"])

    with torch.no_grad():
        refiner.refine_samples([sample], keep)
    pixels = ((kept[-1][0] + 1) * 127.5).clamp(0, 255).round().byte()
    return pixels.permute(1, 2, 0).cpu().numpy()


def truth_of(sample: Sample) -> NDArray[np.uint8]:
    """The truth of a scene, uint8 ``(H, W)``.

    Raises:
        ValueError: the sample was read without truth.
    """
    if sample.truth is None:
        message = f"{sample.image_id} was read without truth"
        raise ValueError(message)
    return sample.truth.numpy()


def _labels(name: str, samples: Sequence[Sample], foreground: Sequence[Tensor]) -> list[Label]:
    rule = BACKGROUNDS[name]
    return [
        compose_label(soft, sample.seed.class_ids, rule).numpy()
        for sample, soft in zip(samples, foreground, strict=True)
    ]


def _write_labels(folder: Path, samples: Sequence[Sample], labels: Sequence[Label]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for sample, label in zip(samples, labels, strict=True):
        label_image(label).save(folder / f"{sample.image_id}.png")
