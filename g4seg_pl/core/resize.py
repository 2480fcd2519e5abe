"""Between an image's native size and the generator's working size, in one place."""

from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional


def image_to_working(
    image: UInt8[Tensor, "3 h w"], size: tuple[int, int]
) -> Float[Tensor, "3 H W"]:
    """Return a float32 image in [-1, 1] of the given height and width."""
    scaled = image[None].float() / 127.5 - 1
    return _resize(scaled, size)[0].clamp(-1, 1)


def masks_to_working(
    masks: Float[Tensor, "k h w"], size: tuple[int, int]
) -> Float[Tensor, "k H W"]:
    """Return masks in [0, 1] at the given height and width."""
    return _resize(masks[None], size)[0].clamp(0, 1)


def apply_change(
    native: Float[Tensor, "k h w"],
    before: Float[Tensor, "k H W"],
    after: Float[Tensor, "k H W"],
) -> Float[Tensor, "k h w"]:
    """Return the native masks plus what changed at working size, clipped to [0, 1].

    Only the change is interpolated: an unchanged mask comes back exactly, fine edges included.

    Args:
        native: masks at native size, in [0, 1].
        before: the same masks as they entered at working size.
        after: the same masks refined.
    """
    size = (native.shape[1], native.shape[2])
    return (native + _resize((after - before)[None], size)[0]).clamp(0, 1)


def resize_maps(maps: Float[Tensor, "m h w"], size: tuple[int, int]) -> Float[Tensor, "m H W"]:
    """Return maps resized bilinearly with pixel centres aligned and no smoothing (OpenCV's way)."""
    if maps.shape[1:] == size or not len(maps):
        return maps.new_zeros(0, *size) if not len(maps) else maps
    resized = functional.interpolate(maps[None], size, mode="bilinear", align_corners=False)
    return resized[0]


def min_max(maps: Float[Tensor, "m h w"], guard: float = 1e-7) -> Float[Tensor, "m h w"]:
    """Return each map shifted and scaled to [0, 1]; a flat one becomes 0.

    Args:
        maps: of any range.
        guard: added to the divisor.
    """
    shifted = maps - maps.amin((1, 2), keepdim=True)
    return shifted / (shifted.amax((1, 2), keepdim=True) + guard)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[2:]) == size:
        return maps
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=True)
