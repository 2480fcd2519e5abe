"""What kept latents and features save: the paper's update on an image that was refined before."""

from collections.abc import Iterator
from functools import partial

import torch

from g4seg_pl.bench.rows import Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.steps import STEPS, one_and_three_classes
from g4seg_pl.bench.timing import describe_pairs, interleaved, ratio
from g4seg_pl.feature_cache import FeatureCache, open_cache
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import Sample

FULL_SIZE_ROUNDS = 3


def cache(setting: Setting) -> Iterator[Row]:
    """Yield the time with everything kept over the time with nothing, and the room it takes.

    Args:
        setting: size, place and rounds; at full size each is timed three times at most.
    """
    sample = one_and_three_classes(setting)[0]
    folder = setting.out("cache")
    kept = open_cache(str(folder), setting.generator.vae, setting.features)
    runs = {
        "none": partial(_refine, setting, sample, None),
        "warm": partial(_refine, setting, sample, kept),
    }
    rounds = min(FULL_SIZE_ROUNDS, setting.rounds) if setting.size.full else setting.rounds
    spent = interleaved(runs, rounds, setting.device)
    warm, none = spent["warm"], spent["none"]
    detail = f"one mask; {describe_pairs(warm, none)}"
    yield Row("cache: warm / none, the paper's update", ratio(warm, none), "×", None, detail)
    bytes_kept = sum(path.stat().st_size for path in folder.rglob("*.npz"))
    yield Row("cache: an image on disk", bytes_kept / 1e6, "MB", None, "latent and CLIP's tokens")


def _refine(setting: Setting, sample: Sample, kept: FeatureCache | None) -> None:
    refiner = G4SegRefiner(setting.generator, setting.features, STEPS["paper"], cache=kept)
    with torch.no_grad():
        refiner.refine_samples([sample])
