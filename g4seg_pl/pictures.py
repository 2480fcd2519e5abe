"""Pictures and masks as users hold them (PIL, NumPy, torch), to tensors and back."""

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from g4seg_pl.types import IGNORE_INDEX, BadItemError

PictureLike = Image.Image | np.ndarray | Tensor
MaskLike = TypeVar("MaskLike", Image.Image, np.ndarray, Tensor)

_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_MASK_MODES = ("1", "L", "F")
# So few values so low are labels (COCO's end at 90), and not shades of grey.
_MOST_LABELS, _LAST_LABEL = 20, 90


def picture_to_tensor(picture: PictureLike) -> Tensor:
    """Return a picture as uint8 ``(3, H, W)``, RGB, on the CPU.

    Args:
        picture: a PIL image of an 8-bit mode, its pixels as they are stored (makers of masks read
            them so too: an EXIF tag turns nothing), an array ``(H, W, 3)`` or ``(H, W)``, or a
            tensor ``(3, H, W)``; arrays and tensors are uint8, or floating point in [0, 1].

    Raises:
        BadItemError: another mode, shape, number type or range.
    """
    if isinstance(picture, Image.Image):
        if picture.mode not in _EIGHT_BIT_MODES:
            message = f"image has mode {picture.mode}; convert it to 8 bits a channel first"
            raise BadItemError(message)
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    if isinstance(picture, np.ndarray):
        channels_last = picture[..., None].repeat(3, -1) if picture.ndim == 2 else picture
        expected, last = "(H, W, 3) or (H, W)", channels_last.shape[-1:]
        tensor = _tensor_of(channels_last, "image")
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
    elif isinstance(picture, Tensor):
        expected, last, tensor = "(3, H, W)", tuple(picture.shape[:1]), picture.detach().cpu()
    else:
        raise _no_picture(picture, "image")
    if tensor.ndim != 3 or last != (3,) or 0 in tensor.shape:
        message = f"image has shape {tuple(picture.shape)}; give {expected}"
        raise BadItemError(message)
    return _to_eight_bits(tensor)


def mask_to_tensor(mask: PictureLike, name: str, size: tuple[int, int]) -> Tensor:
    """Return a mask as float32 ``(H, W)`` in [0, 1] on the CPU.

    Args:
        mask: a PIL image of mode 1, L or F, an array or a tensor ``(H, W)``: floating point in
            [0, 1], boolean, integers 0 and 1 only, or uint8 up to 255 for 1.
        name: its class, for messages.
        size: height and width of the image.

    Raises:
        BadItemError: another mode, size, number type or range.
    """
    if isinstance(mask, Image.Image):
        if mask.mode not in _MASK_MODES:
            message = f"mask of {name!r} has mode {mask.mode}; give one of {_MASK_MODES}"
            raise BadItemError(message)
        tensor = torch.from_numpy(np.array(mask))
    elif isinstance(mask, np.ndarray):
        tensor = _tensor_of(mask, f"mask of {name!r}")
    elif isinstance(mask, Tensor):
        tensor = mask.detach().cpu()
    else:
        raise _no_picture(mask, f"mask of {name!r}")
    if tuple(tensor.shape) != size:
        message = f"mask of {name!r} has shape {tuple(tensor.shape)}; the image has {size}"
        raise BadItemError(message)
    return _to_probability(tensor, name)


def tensor_like(result: Tensor, given: MaskLike) -> MaskLike:
    """Return a refined mask as the kind that was given.

    Args:
        result: float32 ``(H, W)`` in [0, 1].
        given: the mask as it came.

    Returns:
        A PIL image of mode F; an array or tensor of the given floating type (float32 if it was
        none), a tensor on the given one's device.
    """
    if isinstance(given, Image.Image):
        return Image.fromarray(result.numpy())
    if isinstance(given, np.ndarray):
        return result.numpy().astype(given.dtype if given.dtype.kind == "f" else np.float32)
    return result.to(given.device, given.dtype if given.is_floating_point() else torch.float32)


def _tensor_of(array: "np.ndarray[Any, Any]", what: str) -> Tensor:
    """A tensor of an array of either byte order, writable or not (Pillow's are not)."""
    if array.dtype.kind not in "biuf":
        message = f"{what} has values of type {array.dtype}; give floats in [0, 1], or uint8"
        raise BadItemError(message)
    native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def _refuse_labels(tensor: Tensor, name: str) -> None:
    """Refuse label values, which as shades of grey would be nearly nothing: 9 is 0.04."""
    values = [value for value in tensor.unique().tolist() if 0 < value < IGNORE_INDEX]
    if values and len(values) <= _MOST_LABELS and max(values) <= _LAST_LABEL:
        message = (
            f"mask of {name!r} holds the values {values[:5]}, as label files do; give what is "
            f"{name!r} in it, such as mask == {values[0]}, or shades from 0 to 255"
        )
        raise BadItemError(message)


def _to_eight_bits(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        message = f"image has numbers of type {tensor.dtype}; give uint8, or floats in [0, 1]"
        raise BadItemError(message)
    if not ((tensor >= 0) & (tensor <= 1)).all():
        message = "image has values outside [0, 1]; divide by its maximum, or give uint8"
        raise BadItemError(message)
    return (tensor * 255).round().to(torch.uint8)


def _no_picture(value: object, what: str) -> BadItemError:
    """The error (not raised) about what is neither picture nor array, such as a path."""
    if isinstance(value, str | Path):
        opened = f"PIL.Image.open({str(value)!r})"
        return BadItemError(f"{what} is the path {value}; open it first, as {opened}")
    kind = type(value).__name__
    return BadItemError(f"{what} is a {kind}; give a PIL image, an array or a tensor")


def _to_probability(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype == torch.bool or (
        not tensor.is_floating_point() and ((tensor == 0) | (tensor == 1)).all()
    ):
        return tensor.float()
    if tensor.dtype == torch.uint8:
        _refuse_labels(tensor, name)
        return tensor.float() / 255
    if not tensor.is_floating_point():
        message = f"mask of {name!r} has numbers of type {tensor.dtype}; give floats in [0, 1]"
        raise BadItemError(message)
    # Not-a-number compares false, so it is caught here too.
    if not ((tensor >= 0) & (tensor <= 1)).all():
        message = f"mask of {name!r} has values outside [0, 1] or not a number; rescale it"
        raise BadItemError(message)
    return tensor.float()
