"""The denoising loss: what it injects; its values are tested in test_gradient.py."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.generation import rows_per_class
from g4seg_pl.core.injection import Injection
from g4seg_pl.core.loss import DenoisingLoss

SceneMaker = Callable[..., RefinementContext]


@pytest.mark.parametrize("cross", [True, False])
def test_every_field_about_injection_reaches_the_generator(
    cross: bool, scene: SceneMaker, soft_masks: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, seen = scene(), []

    def denoise(noisy: Tensor, timestep: int, embeddings: Tensor, injection: Injection) -> Tensor:
        seen.append(injection)
        return torch.zeros_like(noisy)

    monkeypatch.setattr(context.generator, "denoise", denoise)
    loss = DenoisingLoss(
        7.0,
        cross_attention=cross,
        self_attention=not cross,
        binarise_at=0.3,
        mask_resize="nearest",
    )
    rows = rows_per_class(soft_masks, context)
    loss.maps(rows, context, 400, 0)
    (injection,) = seen
    assert torch.equal(injection.foreground, soft_masks[:, None])
    assert torch.equal(injection.tokens, rows.tokens)
    # Equality of what holds tensors is none of the dataclass's: the rest is compared without.
    masks, tokens = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1)
    expected = Injection(
        masks,
        tokens,
        7.0,
        cross_attention=cross,
        self_attention=not cross,
        binarise_at=0.3,
        resize="nearest",
        classes=rows.classes,
    )
    assert replace(injection, foreground=masks, tokens=tokens) == expected
