"""Sliding windows: a picture larger than the network's own size, window by window."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def sliding_mean(
    apply: Callable[[Tensor], Tensor],
    image: Float[Tensor, "1 3 H W"],
    crop: int,
    stride: int,
) -> Float[Tensor, "1 c H W"]:
    """Return the mean of dense scores over all windows that hold a pixel.

    Windows begin at multiples of the stride; the last of a row or column is moved back inside.

    Args:
        apply: scores ``(1, c, h, w)`` of a window ``(1, 3, h, w)``, of the same size.
        image: the whole picture.
        crop: side of a window, in pixels; sides of the picture that are shorter bound it.
        stride: from one window to the next.
    """
    height, width = image.shape[2:]
    total = image.new_zeros(1, 1, height, width)
    count = image.new_zeros(1, 1, height, width)
    for top in _starts(height, crop, stride):
        for left in _starts(width, crop, stride):
            rows, columns = slice(top, top + crop), slice(left, left + crop)
            scores = apply(image[:, :, rows, columns])
            right, bottom = width - left - scores.shape[3], height - top - scores.shape[2]
            total = total + functional.pad(scores, (left, right, top, bottom))
            count[:, :, rows, columns] += 1
    return total / count


def _starts(length: int, crop: int, stride: int) -> list[int]:
    steps = -(-max(length - crop, 0) // stride)
    return [min(step * stride, max(length - crop, 0)) for step in range(steps + 1)]
