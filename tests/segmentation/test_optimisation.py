"""Learning rates and frozen statistics."""

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, PolynomialLR

from g4seg_pl.segmentation.optimisation import (
    HEADS,
    freeze_batch_norm,
    is_head,
    parameter_groups,
    poly_factor,
)
from g4seg_pl.segmentation.small_deeplab import SmallDeepLab
from g4seg_pl.types import ConfigurationError


def rates(scheduler: LambdaLR | PolynomialLR, steps: int) -> list[float]:
    """The learning rate before each step."""
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_poly_schedule_is_torchs(power: float) -> None:
    total = 37
    ours = SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    found = rates(LambdaLR(ours, lambda step: poly_factor(step, total, power)), total)
    expected = rates(PolynomialLR(theirs, total_iters=total, power=power), total)
    assert found == pytest.approx(expected)
    assert found[10] == pytest.approx(0.3 * (1 - 10 / 37) ** power)


def test_poly_schedule_ends_at_zero_and_warms_up() -> None:
    assert poly_factor(100, 100) == 0
    assert poly_factor(150, 100) == 0
    warming = [poly_factor(step, 100, power=1.0, warmup=4) for step in range(6)]
    assert warming == pytest.approx([0.2, 0.4 * 0.99, 0.6 * 0.98, 0.8 * 0.97, 0.96, 0.95])


def test_a_head_is_a_whole_part_of_a_name() -> None:
    assert is_head("head", HEADS)
    assert is_head("decoder.blocks.0.weight", HEADS)
    assert not any(is_head(name, HEADS) for name in ("header.weight", "decoder_norm.weight"))
    assert not is_head("backbone.head.weight", HEADS)


def test_every_trainable_parameter_is_in_one_group() -> None:
    network = SmallDeepLab(5, width=4)
    network.stem.requires_grad_(requires_grad=False)
    groups = parameter_groups(network, HEADS)
    assert [group["name"] for group in groups] == ["backbone", "head"]
    grouped = [id(value) for group in groups for value in group["params"]]
    trainable = [id(value) for value in network.parameters() if value.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert {id(value) for value in groups[1]["params"]} == {
        id(value) for value in network.head.parameters()
    }


def test_a_network_without_the_named_head_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"heads.*stem"):
        parameter_groups(SmallDeepLab(5, width=4), ["no_such"])


def test_frozen_batch_norm_outside_the_head() -> None:
    network = SmallDeepLab(5, width=4).train()
    freeze_batch_norm(network, HEADS)
    before = {name: value.clone() for name, value in network.named_buffers()}
    network(torch.randn(2, 3, 32, 32))
    changed = {
        name for name, value in network.named_buffers() if not torch.equal(value, before[name])
    }
    assert changed
    assert all(name.startswith("head.") for name in changed)
    assert not network.stem[1].weight.requires_grad
