"""A seed's own threshold, moved to one half and back."""

from dataclasses import Field, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_TOLD = ("threshold", "level", "binarise_at")
_PACKAGE = __name__.partition(".")[0]


def centre_threshold(
    foreground: Float[Tensor, "*shape"], threshold: float
) -> Float[Tensor, "*shape"]:
    """Return masks in which the threshold sits at 0.5, linear on either side; 0 and 1 stay.

    Args:
        foreground: S, in [0, 1].
        threshold: from where on S counts as foreground, between 0 and 1; 0.5 changes nothing.
    """
    if threshold == 0.5:
        return foreground
    below = foreground * (0.5 / threshold)
    above = 1 - (1 - foreground) * (0.5 / (1 - threshold))
    return torch.where(foreground < threshold, below, above)


def restore_threshold(
    centred: Float[Tensor, "*shape"], threshold: float
) -> Float[Tensor, "*shape"]:
    """Return masks with 0.5 back at the threshold: the inverse of ``centre_threshold``."""
    if threshold == 0.5:
        return centred
    below = centred * (threshold / 0.5)
    above = 1 - (1 - centred) * ((1 - threshold) / 0.5)
    return torch.where(centred < 0.5, below, above)


def told_threshold(step: Any, threshold: float, *, always: bool = False) -> Any:
    """Return an update step that knows where labels are cut, unless it was told another value.

    Args:
        step: a dataclass; where they have their default, the fields ``threshold``, ``level`` and
            ``binarise_at`` of this package's steps are replaced, and those of other classes with
            ``metadata={"told_threshold": True}``; so in the steps that it holds. Anything else
            is returned as it is.
        threshold: of the labels, between 0 and 1.
        always: replace other values too, but None, which injects masks soft.
    """
    if isinstance(step, (list, tuple)):
        return type(step)(told_threshold(each, threshold, always=always) for each in step)
    if not is_dataclass(step) or isinstance(step, type):
        return step
    changes: dict[str, Any] = {}
    for field in fields(step):
        value = getattr(step, field.name)
        told = value is not None and _is_told(type(step), field)
        if told and (always or value == field.default):
            changes[field.name] = threshold
        elif field.name in ("steps", "candidates") and isinstance(value, (list, tuple)):
            changes[field.name] = told_threshold(value, threshold, always=always)
    return replace(step, **changes) if changes else step


def _is_told(kind: type, field: "Field[Any]") -> bool:
    """Whether a field is where masks are cut: another's ``level`` may be anything."""
    if field.metadata.get("told_threshold"):
        return True
    given = [base for base in kind.__mro__ if _own_fields(base).get(field.name) is field]
    return field.name in _TOLD and given[-1].__module__.partition(".")[0] == _PACKAGE


def _own_fields(kind: type) -> dict[str, "Field[Any]"]:
    """Fields of a dataclass by name; a field that it inherits is its base's very object."""
    found: dict[str, Field[Any]] = vars(kind).get("__dataclass_fields__", {})
    return found


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that cannot be moved to one half.

    Raises:
        ValueError: it is not strictly between 0 and 1.
    """
    if not 0 < threshold < 1:
        message = f"threshold is {threshold}; give a value between 0 and 1"
        raise ValueError(message)
