"""The embedded world's models and seeds, as the demo and the laboratory use them."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.seeds.clip_es import ClipES
from g4seg_pl.types import Sample, Seed
from g4seg_pl.world.folders import CLIP, GENERATOR
from g4seg_pl.world.scenes import CLASS_NAMES, Split
from g4seg_pl.world.settings import chosen_features


def load_refiner(
    seed: int = 0, features: DenseFeatures | None = None, masks_per_pass: int = 32
) -> G4SegRefiner:
    """The refiner on the embedded generator, without steps.

    Args:
        seed: of all noise.
        features: F of Eq. 8; those chosen for this world if None.
        masks_per_pass: bound on memory; the small generator takes many at once.
    """
    generator = StableDiffusion.from_pretrained(str(GENERATOR))
    features = chosen_features() if features is None else features
    features.load(generator.vae)
    return G4SegRefiner(generator, features, (), seed=seed, masks_per_pass=masks_per_pass)


def load_seed_maker(*, affinity: bool = False, clip: str = str(CLIP)) -> ClipES:
    """Grad-CAM on the embedded CLIP; with ``affinity`` the whole of CLIP-ES.

    The world has no words for its grounds, so the classes an image does not have stand against
    those it has. Its gradients differ from patch to patch: their mean, which Grad-CAM takes,
    seldom points at the object, each patch's own (HiResCAM) does.
    """
    maker = ClipES(
        clip,
        background_words=list(CLASS_NAMES),
        prompt_template="a photo of {}",
        affinity=affinity,
        pooling="patches",
        channel_weights="elementwise",
    )
    maker.configure_model()
    return maker


def scenes(split: Split, count: int, first: int = 0, max_objects: int = 3) -> list[Sample]:
    """Scenes with truth and empty seeds."""
    from datamodules.scenes import ScenesDataModule

    data = ScenesDataModule(split, count, first, max_objects=max_objects, batch_size=64)
    data.setup()
    return [sample for batch in data.test_dataloader() for sample in batch]


def with_seeds(samples: Sequence[Sample], maker: ClipES) -> list[Sample]:
    """The samples with the maker's coarse masks."""
    with torch.no_grad():
        made = [maker.make(sample) for sample in samples]
    return [
        replace(sample, seed=Seed(each.class_ids, each.foreground))
        for sample, each in zip(samples, made, strict=True)
    ]
