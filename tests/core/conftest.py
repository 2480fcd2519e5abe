"""A real tiny model whose U-Net calls are counted, and a batch of images with several masks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.core.context import RefinementContext

CLASSES = ("dog", "cat", "zebra disc", "potted plant")
OWNER = (0, 0, 0, 2)
SceneMaker = Callable[..., RefinementContext]


class CountedGenerator(StableDiffusion):
    """The real model; every row that enters its U-Net is counted."""

    rows = 0
    largest = 0

    def _call_unet(self, noisy: Tensor, *args: Any) -> Tensor:
        self.rows += len(noisy)
        self.largest = max(self.largest, len(noisy))
        return super()._call_unet(noisy, *args)


class PixelPatches:
    """Features without weights."""

    def __call__(self, images: Tensor) -> Tensor:
        return functional.pixel_unshuffle(images, 8)


@pytest.fixture(scope="session")
def counted(sd1_folder: Path) -> CountedGenerator:
    return CountedGenerator.from_pretrained(str(sd1_folder))


@pytest.fixture
def scene(counted: CountedGenerator) -> SceneMaker:
    """Return contexts of chosen masks only; images that have none are left out."""
    counted.rows = counted.largest = 0
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def make(masks: tuple[int, ...] = (0, 1, 2, 3), **options: Any) -> RefinementContext:
        kept = sorted({OWNER[mask] for mask in masks})
        return RefinementContext(
            images=images[kept],
            image_ids=tuple(f"image{index}" for index in kept),
            class_names=tuple(CLASSES[mask] for mask in masks),
            owner=torch.tensor([kept.index(OWNER[mask]) for mask in masks]),
            generator=options.pop("generator", counted),
            features=PixelPatches(),
            **options,
        )

    return make


@pytest.fixture
def soft_masks() -> Tensor:
    coarse = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return functional.interpolate(coarse, (64, 64), mode="bilinear")[:, 0]
