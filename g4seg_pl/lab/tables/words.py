"""Where the word matters, what other generators do, and seeds from the generator itself."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch

from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.controls import FlatInjection, OtherClass, OtherLatent
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.evaluation.bootstrap import paired_overlaps
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.scores import Scores, pooled
from g4seg_pl.lab.sources import SeedKind
from g4seg_pl.lab.stages import NativeStage, Stage, Way
from g4seg_pl.lab.table import Cell, Table
from g4seg_pl.lab.tables.refinement import named, ways_on
from g4seg_pl.world.scenes import CLASS_NAMES, draw_scene

TOUCHING, SAME_COLOURED = "touching another class", "same-coloured as another class"
COLOUR_DISTANCE = 0.18


def prompts_and_injections(way: Way) -> list[Way]:
    """A way as it is, told another class, told nothing, on another latent, under a flat mask."""
    variants: dict[str, list[Stage]] = {"right class": [], "wrong class": [], "other latent": []}
    for stage in (each for each in way.stages if not isinstance(each, NativeStage)):
        variants["right class"].append(stage)
        variants["wrong class"].append(OtherClass([stage], list(CLASS_NAMES)))
        variants["other latent"].append(OtherLatent([stage]))
    first = way.stages[0] if way.stages else None
    if isinstance(first, Gradient):
        variants["empty prompt"] = [replace(first, prompt="empty")]
        variants["right minus empty"] = [replace(first, prompt="class_minus_empty")]
        variants["flat injection"] = [FlatInjection([first])]
        variants["self-attention only"] = [replace(first, inject_cross_attention=False)]
        variants["cross-attention only"] = [replace(first, inject_self_attention=False)]
    if isinstance(first, Affinity):
        # The prompt that it does not have; the one it has is the row of the right class.
        if first.prompt == "empty":
            variants["classes in the prompt"] = [replace(first, prompt="classes")]
        else:
            variants["empty prompt"] = [replace(first, prompt="empty")]
    return [
        Way(f"{way.name}, {name}", tuple(stages), way.background)
        for name, stages in variants.items()
    ]


def words(lab: Lab, checkpoints: Sequence[Path] = ()) -> Table:
    """Gains by what the generator is told, by its training, and where classes meet.

    Args:
        lab: models and store.
        checkpoints: further generators, of growing training for instance, named by their folders.

    Generators other than the lab's own are told the right class and a wrong one, nothing else, and
    take no gradient, which costs as much as the rest together.
    """
    kind = lab.kinds[0]
    rows: list[dict[str, Cell]] = []
    generators = {"embedded": lab.models, "random U-Net": with_random_unet(lab)}
    for folder in checkpoints:
        generators[folder.name] = Models(folder, lab.models.clip, lab.models.device)
    chosen = named(lab, kind, ("g4seg", "affinity", "gradient", "best"))
    lean = [way for way in chosen if way.name != "gradient"]
    for name, models in generators.items():
        other = replace(lab, models=models)
        own = models is lab.models
        ways = [each for way in (chosen if own else lean) for each in prompts_and_injections(way)]
        if not own:
            ways = [way for way in ways if way.name.endswith((", right class", ", wrong class"))]
        # The seeds stay those of the lab's own models, whatever refines them.
        every = [Way("seed"), *ways]
        source, rule = lab.source(kind), lab.background(kind)
        found = other.runner().run(every, source, rule, lab.noise_seeds)
        for way in ways:
            rows += _subset_rows(lab, name, way.name, found["seed"], found[way.name])
    title = "Where the word matters: prompts, generators, scenes where classes meet"
    return Table("words", title, tuple(rows), lab.protocol(kind), signed=("all", "touch", "same"))


def _subset_rows(
    lab: Lab, generator: str, way: str, before: Sequence[Scores], after: Sequence[Scores]
) -> list[dict[str, Cell]]:
    seed, ours = pooled(before), pooled(after)
    flags = [meeting(name) for name in seed.ids]
    row: dict[str, Cell] = {"generator": generator, "way": way}
    for index, name in enumerate(("all", TOUCHING, SAME_COLOURED)):
        inside = [index == 0 or flag[index - 1] for flag in flags]
        if sum(inside) > 1:
            keep = np.flatnonzero(inside)
            gain = paired_overlaps(seed.overlaps[keep], ours.overlaps[keep], lab.resamples)
            row |= {name: 100 * gain.value, f"{name}_se": 100 * gain.standard_error}
    return [row]


@lru_cache(maxsize=4096)
def meeting(image_id: str) -> tuple[bool, bool]:
    """Whether two classes of a scene touch, and whether two have nearly one mean colour."""
    scene = draw_scene(int(image_id.removeprefix("scene_")))
    masks = [(scene.mask == label).astype(np.uint8) for label in scene.labels]
    colours = [scene.image[mask > 0].mean(axis=0) / 255 for mask in masks]
    kernel = np.ones((5, 5), np.uint8)
    pairs = [(i, j) for i in range(len(masks)) for j in range(i)]
    touching = any((cv2.dilate(masks[i], kernel) & masks[j]).any() for i, j in pairs)
    alike = any(np.linalg.norm(colours[i] - colours[j]) < COLOUR_DISTANCE for i, j in pairs)
    return touching, alike


def with_random_unet(lab: Lab) -> Models:
    """The lab's generator with a U-Net of the same size and random weights."""
    from diffusers import UNet2DConditionModel

    generator = Path(lab.models.generator)
    folder = lab.store.root / "random_unet" / lab.models.generator_identity
    if not (folder / "unet").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        for part in generator.iterdir():
            if part.name != "unet" and not (folder / part.name).exists():
                (folder / part.name).symlink_to(part.resolve(), part.is_dir())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = UNet2DConditionModel.load_config(generator / "unet")
            made = folder / "unet.tmp"
            UNet2DConditionModel.from_config(config).save_pretrained(made)
            made.rename(folder / "unet")  # a folder of this name is whole
    return Models(folder, lab.models.clip, lab.models.device)


def open_vocabulary(lab: Lab) -> Table:
    """Seeds from the generator alone, refined by the generator alone."""
    kind: SeedKind = "cross_attention"
    iterated = Affinity(products=10, power=1.6, timestep=100, norm="range")
    ways = [
        Way("self-attention ten times (iSeg-like)", (iterated,)),
        *named(lab, kind, ("affinity", "gradient", "affinity+gradient", "g4seg", "best")),
        *named(lab, kind, ("affinity+gradient+dcrf", "best+dcrf", "dcrf", "feature-nn", "blur")),
    ]
    note = (
        "The seed row is DiffSegmenter's recipe (cross-attention times self-attention at t = 100) "
        "on the same generator. The iSeg-like row is no reproduction: ten products with sharpened "
        "attention, without its entropy reduction."
    )
    title = "An open-vocabulary segmenter from one generator: cross-attention seeds"
    return ways_on(lab, "open_vocabulary", title, [(kind, ways)], note)
