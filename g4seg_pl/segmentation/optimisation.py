"""Learning rates as the field sets them: ten times as high in the head, falling polynomially."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from g4seg_pl.types import ConfigurationError

HEADS = ("head", "classifier", "decode_head", "decoder", "segmentation_head")


def poly_factor(step: int, total: int, power: float = 0.9, warmup: int = 0) -> float:
    """Return the factor on the learning rate at a step: (1 - step / total)^power.

    Args:
        step: optimiser steps taken so far.
        total: steps of the whole run; from there on the factor is 0.
        power: of the polynomial.
        warmup: steps over which the factor also grows linearly from nearly 0.
    """
    falling: float = max(0.0, 1 - step / total) ** power
    rising = min(1.0, (step + 1) / (warmup + 1))
    return rising * falling


def is_head(name: str, heads: Sequence[str]) -> bool:
    """Whether a dotted parameter or module name lies in one of the heads."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def parameter_groups(network: nn.Module, heads: Sequence[str]) -> list[dict[str, Any]]:
    """Return the trainable parameters outside and inside the head, in this order.

    Args:
        network: whose frozen parameters are left out.
        heads: names of the children that are the head; those it does not have do not matter.

    Returns:
        two optimiser groups, ``name`` being ``backbone`` and ``head``; an empty one is left out.

    Raises:
        ConfigurationError: no parameter lies in the head, or none is trainable.
    """
    named = [(name, value) for name, value in network.named_parameters() if value.requires_grad]
    inside = [value for name, value in named if is_head(name, heads)]
    outside = [value for name, value in named if not is_head(name, heads)]
    if not inside:
        children = [name for name, _ in network.named_children()]
        msg = f"heads: {list(heads)} name no trainable part of the network, which has {children}"
        raise ConfigurationError(msg)
    groups = [{"params": outside, "name": "backbone"}, {"params": inside, "name": "head"}]
    return [group for group in groups if group["params"]]


def freeze_batch_norm(network: nn.Module, heads: Sequence[str]) -> None:
    """Fix statistics, scale and shift of every batch norm outside the head.

    To be called after every ``network.train()``, which sets them going again.
    """
    for name, part in network.named_modules():
        if isinstance(part, _BatchNorm) and not is_head(name, heads):
            part.eval()
            part.requires_grad_(requires_grad=False)
