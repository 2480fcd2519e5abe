"""What a generator was asked to inject, for tests of the steps that ask."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from g4seg_pl.core.injection import Injection


def given_to_the_unet(
    generator: Any, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, Injection]]:
    """Return a list that fills with what the generator is asked to denoise, and under what."""
    seen: list[tuple[Tensor, Injection]] = []
    original = generator.denoise

    def denoise(noisy: Tensor, timestep: int, embeddings: Tensor, injection: Injection) -> Tensor:
        seen.append((noisy, injection))
        return original(noisy, timestep, embeddings, injection)

    monkeypatch.setattr(generator, "denoise", denoise)
    return seen


def same_but_tensors(injection: Injection, weight: float, **settings: Any) -> bool:
    """Whether all but masks and tokens is this: the dataclass cannot compare tensors."""
    masks, tokens = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1)
    expected = Injection(masks, tokens, weight, **settings)
    return replace(injection, foreground=masks, tokens=tokens) == expected
