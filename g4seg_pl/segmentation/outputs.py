"""What a network may return, and the logits in it."""

from collections.abc import Callable, Mapping
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


def padded_logits(network: Callable[[Tensor], Any], images: Tensor, multiple: int) -> Tensor:
    """Return the logits of a network that only takes sides that are a multiple of a number.

    Args:
        network: from images to anything that :func:`logits_of` understands.
        images: normalised ``(B, 3, H, W)``; they are padded to the right and below by 0, which is
            the mean colour.
        multiple: of the sides; 1 pads nothing.

    Returns:
        logits at the network's own size if nothing was padded, else ``(B, C, H, W)``.
    """
    height, width = images.shape[-2:]
    below, right = -height % multiple, -width % multiple
    if not below and not right:
        return logits_of(network(images))
    padded = functional.pad(images, (0, right, 0, below))
    logits = resize_logits(logits_of(network(padded)), (height + below, width + right))
    return logits[..., :height, :width]


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return logits ``(B, C, H, W)`` at the given size, in float32 (bilinear)."""
    logits = logits.float()
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
