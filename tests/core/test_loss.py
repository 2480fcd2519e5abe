"""The denoising loss: what it injects; its values are tested in test_gradient.py."""

from collections.abc import Callable

import pytest
import torch
from injections import given_to_the_unet, same_but_tensors
from torch import Tensor

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.generation import rows_per_class
from g4seg_pl.core.loss import DenoisingLoss

SceneMaker = Callable[..., RefinementContext]


@pytest.mark.parametrize("cross", [True, False])
def test_every_field_about_injection_reaches_the_generator(
    cross: bool, scene: SceneMaker, soft_masks: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = scene()
    seen = given_to_the_unet(context.generator, monkeypatch)
    loss = DenoisingLoss(
        7.0,
        cross_attention=cross,
        self_attention=not cross,
        binarise_at=0.3,
        mask_resize="nearest",
    )
    rows = rows_per_class(soft_masks, context)
    loss.maps(rows, context, 400, 0)
    ((_, injection),) = seen
    assert torch.equal(injection.foreground, soft_masks[:, None])
    assert torch.equal(injection.tokens, rows.tokens)
    assert same_but_tensors(
        injection,
        7.0,
        cross_attention=cross,
        self_attention=not cross,
        binarise_at=0.3,
        resize="nearest",
        classes=rows.classes,
    )
