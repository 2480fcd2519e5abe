"""What a network may return, and the logits in it."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import functional


@runtime_checkable
class Pretrained(Protocol):
    """A network that can fetch published weights; it is asked to just before it is trained."""

    def load_pretrained(self) -> None:
        """Load them; called once, and not where a checkpoint will overwrite them."""


def logits_of(output: Any) -> Tensor:
    """Return the logits ``(B, C, h, w)`` in what a network returned.

    Args:
        output: a tensor (ours, segmentation_models_pytorch), a mapping with ``out``
            (torchvision), or anything with ``logits`` (transformers).

    Raises:
        TypeError: none of these.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "out" in output:
        tensor: Tensor = output["out"]
        return tensor
    if hasattr(output, "logits"):
        logits: Tensor = output.logits
        return logits
    msg = (
        f"the network returned {type(output).__name__}: it must return a tensor of logits, a "
        "mapping with `out`, or an object with `logits`"
    )
    raise TypeError(msg)


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return logits ``(B, C, H, W)`` at the given size, in float32 (bilinear)."""
    logits = logits.float()
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
