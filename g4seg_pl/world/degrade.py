"""Coarse masks made from exact ones: what real coarse masks get wrong, one fault at a time."""

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Fault = Literal["erode", "dilate", "shift", "low_resolution", "mixed"]
FAULTS: tuple[Fault, ...] = ("erode", "dilate", "shift", "low_resolution")


def degrade(mask: NDArray[np.bool_], fault: Fault, seed: int, strength: float = 1.0) -> Array:
    """A soft coarse mask from an exact one.

    Args:
        mask: ``(H, W)``, True on the object.
        fault: what goes wrong; ``mixed`` draws one of the other four by the seed.
        seed: of the fault's own chance.
        strength: 1 is about a sixteenth of the picture's side.

    Returns:
        ``(H, W)`` in [0, 1], its largest value 1; soft edges, so that thresholds matter.
    """
    rng = np.random.default_rng([seed, 7])
    if fault == "mixed":
        fault = FAULTS[int(rng.integers(len(FAULTS)))]
    reach = max(1, round(strength * mask.shape[0] / 16 * rng.uniform(0.7, 1.3)))
    coarse = _apply(mask.astype(np.float32), fault, reach, rng)
    if coarse.max() < 0.5:  # a thin object would vanish altogether: leave it blurred instead
        coarse = mask.astype(np.float32)
    soft = cv2.GaussianBlur(coarse, (0, 0), mask.shape[0] / 40)
    return np.asarray(soft / max(float(soft.max()), 1e-6), np.float32)


def _apply(mask: Array, fault: Fault, reach: int, rng: np.random.Generator) -> Array:
    match fault:
        case "erode" | "dilate":
            kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
            change = cv2.erode if fault == "erode" else cv2.dilate
            # Outside of the picture counts as background for both.
            return np.asarray(change(mask, kernel, borderValue=0.0), np.float32)
        case "shift":
            angle = rng.uniform(0, 2 * np.pi)
            x, y = 1.3 * reach * np.cos(angle), 1.3 * reach * np.sin(angle)
            move = np.asarray([[1, 0, x], [0, 1, y]], np.float32)
            return np.asarray(cv2.warpAffine(mask, move, mask.shape[::-1]), np.float32)
        case _:
            side = max(2, mask.shape[0] // (3 * reach))
            small = cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA)
            full = cv2.resize(small, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
            return np.asarray(full, np.float32)
