"""Outlines of the scene classes as signed functions of local coordinates: negative inside.

Every function takes ``u`` and ``v`` (float arrays of one shape; the object spans about [-1, 1],
``v`` grows downwards) and a generator for its individual variation, and returns an array of the
same shape. The values are only near-distances: they are divided by their own gradient when drawn.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Shape = Callable[[Array, Array, np.random.Generator], Array]


def _polar(u: Array, v: Array) -> tuple[Array, Array]:
    return np.hypot(u, v), np.arctan2(v, u)


def _union(*parts: Array) -> Array:
    return np.asarray(np.minimum.reduce(parts))


def _box(u: Array, v: Array, half_width: float, half_height: float) -> Array:
    return np.asarray(np.maximum(np.abs(u) - half_width, np.abs(v) - half_height))


def disc(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """A slightly wobbly disc."""
    radius, angle = _polar(u, v)
    wobble = 0.06 * np.cos(3 * angle + rng.uniform(0, 6.28))
    wobble += 0.04 * np.cos(5 * angle + rng.uniform(0, 6.28))
    return np.asarray(radius - 0.92 - wobble)


def block(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """A rectangle with sheared sides."""
    shear = rng.uniform(-0.25, 0.25)
    return _box(u + shear * v, v, 0.95, rng.uniform(0.5, 0.75))


def star(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """A star of five or six points."""
    radius, angle = _polar(u, v)
    points = int(rng.integers(5, 7))
    sector = np.abs(((angle * points / (2 * np.pi)) % 1.0) - 0.5) * 2
    return np.asarray(radius - (1.0 - (0.52 + rng.uniform(-0.06, 0.04)) * sector))


def leaf(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """The overlap of two circles, with a short stalk."""
    bend = rng.uniform(0.55, 0.8)
    reach = np.sqrt(1.0 + bend**2)
    body = np.maximum(np.hypot(u, v - bend), np.hypot(u, v + bend)) - reach
    stalk = _box(u - 1.05, v - 0.04 * u, 0.18, 0.05)
    return _union(body, stalk)


def mushroom(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """A half-ellipse cap on a stem that widens downwards."""
    cap = np.maximum(np.hypot(u / 0.98, (v + 0.05) / 0.85) - 1.0, v - 0.05) * 0.85
    width = rng.uniform(0.22, 0.36)
    stem = np.maximum(np.abs(u) - width - 0.1 * v, np.maximum(-v, v - 0.95))
    return _union(cap, stem)


def fish(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """An ellipse with a forked tail and a fin."""
    height = rng.uniform(0.45, 0.6)
    body = (np.hypot((u + 0.15) / 0.8, v / height) - 1.0) * height
    spread = np.abs(v) - 0.85 * (u - 0.45)
    tail = np.maximum(np.maximum(spread, 0.45 - u), u - 0.98 + 0.25 * (1 - np.abs(v) * 1.6))
    fin = np.maximum(np.hypot(u + 0.05, v + height) - 0.3, v + height * 0.4)
    return _union(body, tail, fin)


def ring(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """An annulus: its hole is background."""
    width = rng.uniform(0.17, 0.26)
    return np.abs(np.hypot(u, v) - (0.95 - width)) - width


def wedge(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """A slice with one slanted side."""
    slant = rng.uniform(0.5, 0.75)
    return np.maximum(_box(u, v, 0.95, 0.7), -(v + 0.62) + slant * (u - 0.9) * -0.9 - 0.55)


def heart(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Two lobes over a point."""
    w = np.abs(u)
    lobe = np.hypot(w - 0.46, v + 0.4) - rng.uniform(0.46, 0.52)
    point = np.maximum(w * 0.78 + (v + 0.1) * 0.72 - 0.62, -v - 0.45)
    return _union(lobe, point)


def flower(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Five to eight round petals."""
    radius, angle = _polar(u, v)
    petals = int(rng.integers(5, 9))
    return radius - (0.74 + 0.24 * np.cos(petals * angle))


def tree(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """A lobed crown over a trunk."""
    _, angle = _polar(u, v + 0.3)
    lobes = 0.07 * np.cos(7 * angle + rng.uniform(0, 6.28)) + 0.05 * np.cos(11 * angle)
    crown = np.hypot(u / 0.85, (v + 0.3) / 0.68) * 0.68 - 0.68 - lobes
    trunk = np.maximum(np.abs(u) - rng.uniform(0.1, 0.17), np.maximum(-v, v - 0.98))
    return _union(crown, trunk)


def ball(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """An exact circle."""
    del rng
    return np.hypot(u, v) - 0.95
