"""Losses against loops over pixels and against torch's own."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.segmentation.losses import (
    ConfidentCrossEntropy,
    CrossEntropy,
    SoftCrossEntropy,
    WeightedCrossEntropy,
)
from g4seg_pl.types import ConfigurationError

LABELS = 4


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels with some 255, and a soft map."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, LABELS, 5, 6, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, LABELS, (2, 5, 6), generator=generator)
    mask[0, 0] = mask[1, :, 2] = 255
    soft = torch.randn(2, LABELS, 5, 6, generator=generator, dtype=torch.float64).mul(3).softmax(1)
    return logits, mask, soft


def by_pixel(logits: Tensor, mask: Tensor) -> list[tuple[int, int, int, list[float]]]:
    """Place and log-probabilities of every pixel that counts."""
    found = []
    for image in range(len(mask)):
        for row in range(mask.shape[1]):
            for column in range(mask.shape[2]):
                if mask[image, row, column] == 255:
                    continue
                values = logits[image, :, row, column].tolist()
                norm = math.log(sum(math.exp(value) for value in values))
                found.append((image, row, column, [value - norm for value in values]))
    return found


def test_cross_entropy_is_torchs(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, mask, soft = batch
    expected = functional.cross_entropy(logits, mask, ignore_index=255)
    assert CrossEntropy()(logits, mask, None).item() == pytest.approx(expected.item())
    assert CrossEntropy()(logits, mask, soft).item() == pytest.approx(expected.item())


def test_confident_pixels_only(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, mask, soft = batch
    # As CLIP-ES does it in its files: 255 where the best probability is below the bound.
    masked = mask.clone()
    masked[soft.max(dim=1).values < 0.8] = 255
    assert 0 < (masked != 255).sum() < (mask != 255).sum()
    expected = functional.cross_entropy(logits, masked, ignore_index=255)
    loss = ConfidentCrossEntropy(least=0.8)(logits, mask, soft)
    assert loss.item() == pytest.approx(expected.item())


def test_a_pixel_of_just_the_least_confidence_counts() -> None:
    soft = torch.tensor([[0.75, 0.5], [0.25, 0.5]]).view(1, 2, 1, 2)
    logits, mask = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(1, 2, 1, 2), torch.zeros(1, 1, 2)
    loss = ConfidentCrossEntropy(least=0.75)(logits, mask.long(), soft)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.0)))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_weights_are_the_labels_probabilities(
    batch: tuple[Tensor, Tensor, Tensor], power: float
) -> None:
    logits, mask, soft = batch
    above = below = 0.0
    for image, row, column, logs in by_pixel(logits, mask):
        label = int(mask[image, row, column])
        weight = float(soft[image, label, row, column]) ** power
        above -= weight * logs[label]
        below += weight
    loss = WeightedCrossEntropy(power)(logits, mask, soft)
    assert loss.item() == pytest.approx(above / below)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_soft_targets(batch: tuple[Tensor, Tensor, Tensor], share: float) -> None:
    logits, mask, soft = batch
    losses = []
    for image, row, column, logs in by_pixel(logits, mask):
        target = soft[image, :, row, column].tolist()
        against_soft = -sum(p * log for p, log in zip(target, logs, strict=True))
        against_label = -logs[int(mask[image, row, column])]
        losses.append(share * against_soft + (1 - share) * against_label)
    loss = SoftCrossEntropy(share)(logits, mask, soft)
    assert loss.item() == pytest.approx(sum(losses) / len(losses))


def test_soft_targets_that_are_certain_are_labels(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, mask, _ = batch
    certain = functional.one_hot(mask.clamp(max=LABELS - 1), LABELS).permute(0, 3, 1, 2).double()
    plain = CrossEntropy()(logits, mask, None).item()
    for loss in (SoftCrossEntropy(), WeightedCrossEntropy(), ConfidentCrossEntropy()):
        assert loss(logits, mask, certain).item() == pytest.approx(plain)


@pytest.mark.parametrize(
    "loss",
    [CrossEntropy(), ConfidentCrossEntropy(), WeightedCrossEntropy(), SoftCrossEntropy()],
    ids=lambda loss: type(loss).__name__,
)
def test_nothing_to_count_gives_zero_with_a_gradient(loss: CrossEntropy) -> None:
    logits = torch.randn(1, LABELS, 3, 3, requires_grad=True)
    mask, soft = torch.full((1, 3, 3), 255), torch.zeros(1, LABELS, 3, 3)
    value = loss(logits, mask, soft)
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert torch.all(logits.grad == 0)


def test_missing_soft_map_is_named(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    for loss in (ConfidentCrossEntropy(), WeightedCrossEntropy(), SoftCrossEntropy()):
        with pytest.raises(ConfigurationError, match=r"data\.soft"):
            loss(*batch[:2], None)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(ConfidentCrossEntropy, 2.0), (WeightedCrossEntropy, -1.0), (SoftCrossEntropy, 1.5)],
)
def test_impossible_settings_are_refused(kind: type, value: float) -> None:
    with pytest.raises(ConfigurationError, match="loss"):
        kind(value)
