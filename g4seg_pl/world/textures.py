"""Surfaces of objects and grounds: each maps local coordinates to a pattern in [0, 1].

The pattern mixes the two colours of a material. Object patterns move with the object, ground
patterns with the picture; both come in the same few kinds so that texture alone does not tell an
object from what is behind it.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Texture = Callable[[Array, Array, np.random.Generator], Array]


def fractal(size: int, rng: np.random.Generator, coarsest: int = 3, octaves: int = 4) -> Array:
    """Smooth noise summed over octaves, ``(size, size)``, mean 0, standard deviation about 1."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = min(coarsest * 2**octave, size)
        grid = rng.standard_normal((cells, cells), dtype=np.float32)
        total += 0.62**octave * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    return total / np.float32(total.std() + 1e-6)


def _wave(phase: Array, sharpness: float = 3.0) -> Array:
    return 0.5 + 0.5 * np.tanh(sharpness * np.sin(phase))


def _cells(u: Array, v: Array, per_unit: float, offset_rows: bool) -> tuple[Array, Array]:
    row = np.floor(v * per_unit)
    shift = 0.5 * (row % 2) if offset_rows else 0.0
    return (u * per_unit + shift) % 1.0 - 0.5, (v * per_unit) % 1.0 - 0.5


def stripes(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Wavy stripes."""
    return _wave(rng.uniform(8, 10) * (u + 0.12 * np.sin(4 * v + rng.uniform(0, 6.28))))


def bricks(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Rows of bricks with mortar."""
    a, b = _cells(u * 0.6, v, rng.uniform(2.4, 3.2), offset_rows=True)
    return ((np.abs(a) < 0.42) & (np.abs(b) < 0.36)).astype(np.float32)


def facets(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Sectors that alternate between light and dark."""
    angle = np.arctan2(v, u)
    return _wave(angle * float(rng.integers(5, 7)), 2.0)


def veins(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """A midrib with side veins."""
    rib = np.abs(v) < 0.06
    side = _wave(rng.uniform(11, 14) * (u - 0.9 * np.abs(v)), 2.0) * 0.85
    return np.where(rib, 1.0, side).astype(np.float32)


def dots(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Staggered round spots."""
    a, b = _cells(u, v, rng.uniform(1.9, 2.4), offset_rows=True)
    return (np.hypot(a, b) < 0.29).astype(np.float32)


def scales(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Overlapping arcs, and an eye."""
    a, b = _cells(u, v, rng.uniform(3.2, 4.0), offset_rows=True)
    eye = np.hypot(u + 0.62, v + 0.1) < 0.11
    return np.where(eye, 0.0, np.clip(1.25 - 1.6 * np.hypot(a, b + 0.3), 0, 1)).astype(np.float32)


def band(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Concentric rings."""
    return _wave(np.hypot(u, v) * rng.uniform(14, 17), 1.5)


def holes(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """A few dark round holes."""
    centres = rng.uniform(-0.8, 0.8, (6, 2)) * (1.0, 0.6)
    radii = rng.uniform(0.1, 0.22, 6)
    distance = [np.hypot(u - x, v - y) - r for (x, y), r in zip(centres, radii, strict=True)]
    return np.asarray(np.minimum.reduce(distance) > 0, np.float32)


def checks(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Diagonal checks."""
    pitch = rng.uniform(6.0, 7.5)
    waves = np.sin(pitch * (u + v)) * np.sin(pitch * (u - v))
    return np.asarray(0.5 + 0.5 * np.tanh(4 * waves))


def petals(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """A dark heart and rays."""
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    rays = 0.7 + 0.3 * np.cos(angle * float(rng.integers(10, 17)))
    return np.where(radius < 0.3, 0.0, rays * (0.5 + 0.5 * radius)).astype(np.float32)


def foliage(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Leafy noise over a plain trunk."""
    noise = fractal(u.shape[0], rng, coarsest=10, octaves=3)
    return np.where(v < 0.25, 0.5 + 0.35 * noise, 0.15).clip(0, 1).astype(np.float32)


def sectors(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Six beach-ball sectors bent around a pole."""
    angle = np.arctan2(v + 0.15, u - 0.1) + rng.uniform(0, 6.28) + 0.5 * np.hypot(u, v)
    return _wave(angle * 3, 6.0)
