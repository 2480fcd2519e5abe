"""Reading pictures and label images, whatever their mode, or saying why not.

Orientation. Masks of VOC, COCO and their kin lie on the stored pixel grid, and the tools that
made the coarse masks read pictures with `PIL.Image.open`, which leaves a rotation noted in EXIF
alone. So `stored` is the default, and pictures and masks agree. `exif` turns the picture as
viewers do, for masks drawn in a viewer. Where the choice is wrong the sizes differ, and the error
of `check_size` says so.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from datamodules.errors import bad_item
from datamodules.files import File, openable

Orientation = Literal["stored", "exif"]

_EIGHT_BIT = frozenset({"RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB"})
_TRANSPARENT = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})
_SIXTEEN_BIT = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})


@contextmanager
def _opened(path: File) -> Iterator[Image.Image]:
    """Opens a picture; every way in which decoding fails becomes one error that names it."""
    try:
        with warnings.catch_warnings():
            # Pillow only warns about pictures of twice its limit or less; its other warnings
            # (odd EXIF bytes) concern nothing that is read here.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(openable(path)) as image:
                yield image
    except FileNotFoundError as error:
        raise bad_item(path, "no such file", "Check the id and the folder") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise bad_item(path, f"too large: {error}", "Make a smaller copy") from error
    # Pillow's decoders raise SyntaxError, ValueError and others besides OSError on damaged files.
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError) as error:
        problem = f"truncated or not a picture: {error}"
        raise bad_item(path, problem, "Get the file again, or leave it out") from error


def _to_rgb(image: Image.Image, path: File) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        return _from_sixteen_bit(image, path)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        # Onto white, as it is shown; what lies under transparent pixels is arbitrary.
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(canvas, layer).convert("RGB")
    if image.mode in _EIGHT_BIT:
        return image.convert("RGB")
    raise bad_item(path, f"pixels of mode {image.mode}", "Convert the picture to 8-bit RGB")


def _from_sixteen_bit(image: Image.Image, path: File) -> Image.Image:
    """8-bit grey from 16-bit grey; Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 2**16 - 1:
        problem = f"32-bit values from {values.min()} to {values.max()}"
        raise bad_item(path, problem, "Convert the picture to 8-bit RGB")
    grey = np.rint(values / 257).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def read_image(path: File, orientation: Orientation = "stored") -> NDArray[np.uint8]:
    """Reads a picture as uint8 RGB ``(H, W, 3)``.

    Greyscale is repeated, CMYK converted, 16-bit scaled to 8, transparency laid onto white.

    Args:
        path: any format Pillow reads; of several frames the first is taken.
        orientation: `stored` leaves the pixel grid as it is in the file, `exif` turns it.

    Raises:
        BadItemError: missing, truncated, too large, or of a mode without a meaning as a picture.
    """
    with _opened(path) as image:
        image.load()
        turned = ImageOps.exif_transpose(image) if orientation == "exif" else image
        return np.array(_to_rgb(turned, path))


def read_label(path: File) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Reads a label image ``(H, W)`` by index: mode P or L as uint8, mode I;16 as uint16.

    Raises:
        BadItemError: missing, truncated, or in colours.
    """
    with _opened(path) as image:
        if image.mode not in ("P", "L", "I;16"):
            problem = f"a label image of mode {image.mode}"
            remedy = "Write label values as mode P or L; colours are ambiguous and not decoded"
            raise bad_item(path, problem, remedy)
        image.load()
        return np.array(image)


def header_size(path: File, orientation: Orientation = "stored") -> tuple[int, int]:
    """Height and width from the header alone.

    Raises:
        BadItemError: missing, or no picture.
    """
    with _opened(path) as image:
        width, height = image.size
        turned = orientation == "exif" and image.getexif().get(0x0112, 1) >= 5
    return (width, height) if turned else (height, width)


def check_size(
    path: File, what: str, found: tuple[int, int], image: tuple[int, int], remedy: str
) -> None:
    """Checks that a mask has the height and width of its image.

    Args:
        path: the file of the mask.
        what: "seed" or "ground truth".
        found: height and width of the mask.
        image: height and width of the image.
        remedy: what to do if the sizes differ otherwise than by a quarter turn.

    Raises:
        BadItemError: they differ; a quarter turn is pointed out.
    """
    if found == image:
        return
    if found == image[::-1]:
        remedy = "They differ by a quarter turn: set orientation to exif, or to stored if it was"
    problem = (
        f"the {what} is {found[0]}x{found[1]}, the image {image[0]}x{image[1]} (height x width)"
    )
    raise bad_item(path, problem, remedy)
