"""What a process does to a feature cache; apart, so that a second process imports little."""

from pathlib import Path

import torch
from torch import Tensor

from g4seg_pl.feature_cache import FeatureCache


def images_of(count: int = 3) -> Tensor:
    """Small random images, the same ones everywhere."""
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Counting:
    """A network that says how many images it was given."""

    def __init__(self, factor: float = 0.1) -> None:
        self.factor, self.seen = factor, 0

    def __call__(self, images: Tensor) -> Tensor:
        """Scale."""
        self.seen += len(images)
        return images * self.factor


def fetch_many(folder: str) -> list[float]:
    """Every image again and again."""
    return [
        float(FeatureCache(Path(folder), "a").fetch("latents", part, Counting()).double().sum())
        for _ in range(5)
        for part in images_of(20).split(4)
    ]
