"""Procedural pictures with exact masks, deterministic by seed.

A scene has one to three objects of twelve classes over one or two textured grounds. Classes differ
by outline, texture and colour together; each colour is shared with other classes and with grounds,
light and shadow run across borders, so that neither colour nor texture alone gives the mask.
"""

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from g4seg_pl.world import shapes, textures

Array = NDArray[np.floating[Any]]
IMAGE_SIZE = 64
FIRST_SEED = {"train": 0, "val": 10_000_000, "test": 20_000_000}
Split = Literal["train", "val", "test"]

_COLOURS = {  # sRGB in [0, 1]; every entry is used by grounds and by several classes
    "red": (0.66, 0.25, 0.22),
    "orange": (0.80, 0.52, 0.25),
    "yellow": (0.82, 0.73, 0.36),
    "green": (0.32, 0.47, 0.22),
    "teal": (0.27, 0.52, 0.51),
    "blue": (0.34, 0.50, 0.71),
    "violet": (0.55, 0.42, 0.62),
    "brown": (0.46, 0.35, 0.25),
    "grey": (0.52, 0.52, 0.51),
    "pale": (0.83, 0.81, 0.76),
}


@dataclass(frozen=True)
class ObjectClass:
    """One class: its label value, prompt name, outline, texture and usual colours."""

    label: int
    name: str
    shape: shapes.Shape
    texture: textures.Texture
    colours: tuple[str, ...]


CLASSES = (
    ObjectClass(1, "zebra disc", shapes.disc, textures.stripes, ("pale", "grey", "yellow")),
    ObjectClass(2, "brick block", shapes.block, textures.bricks, ("red", "brown", "grey")),
    ObjectClass(3, "star", shapes.star, textures.facets, ("yellow", "orange", "blue")),
    ObjectClass(4, "leaf", shapes.leaf, textures.veins, ("green", "brown", "orange")),
    ObjectClass(5, "mushroom", shapes.mushroom, textures.dots, ("red", "orange", "brown")),
    ObjectClass(6, "fish", shapes.fish, textures.scales, ("teal", "blue", "grey")),
    ObjectClass(7, "ring", shapes.ring, textures.band, ("blue", "violet", "teal")),
    ObjectClass(8, "cheese wedge", shapes.wedge, textures.holes, ("yellow", "orange", "pale")),
    ObjectClass(9, "heart", shapes.heart, textures.checks, ("red", "violet", "pale")),
    ObjectClass(10, "flower", shapes.flower, textures.petals, ("violet", "pale", "red")),
    ObjectClass(11, "tree", shapes.tree, textures.foliage, ("green", "teal", "brown")),
    ObjectClass(12, "beach ball", shapes.ball, textures.sectors, ("pale", "teal", "green")),
)
CLASS_NAMES = tuple(each.name for each in CLASSES)


@dataclass(frozen=True)
class Scene:
    """One picture and its truth.

    Attributes:
        image: uint8 ``(size, size, 3)``, RGB.
        mask: uint8 ``(size, size)``, 0 background, 1–12 the label of the class.
        labels: the classes that are visible, ascending.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    labels: tuple[int, ...]


def draw_scene(seed: int, size: int = IMAGE_SIZE, max_objects: int = 3) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: any non-negative integer; equal seeds give equal scenes.
        size: side in pixels.
        max_objects: 1 to 3; 1 draws the single-object scenes of the gates.

    Returns:
        The picture with its exact mask; every listed class shows at least 1.2 % of the picture.
    """
    if seed < 0 or not 1 <= max_objects <= 3:
        message = f"seed must be >= 0 and max_objects 1..3; got {seed} and {max_objects}"
        raise ValueError(message)
    rng = np.random.default_rng([seed, max_objects])
    while True:
        image, mask = _paint(rng, size, max_objects)
        counts = np.bincount(mask.ravel(), minlength=len(CLASSES) + 1)
        labels = tuple(int(label) for label in np.flatnonzero(counts[1:]) + 1)
        # A class that is all but hidden would be a label without evidence: draw again.
        if labels and min(counts[label] for label in labels) >= 0.012 * size * size:
            return Scene(_develop(image, rng), mask, labels)


def caption(labels: tuple[int, ...]) -> str:
    """The prompt that names all classes of a scene, e.g. ``a photo of star and leaf``."""
    return "a photo of " + " and ".join(CLASSES[label - 1].name for label in labels)


def _paint(rng: np.random.Generator, size: int, most: int) -> tuple[Array, NDArray[np.uint8]]:
    image = _ground(rng, size)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(int(rng.integers(1, 5))):
        _clutter(image, rng, size)
    count = 1 if most == 1 else int(rng.choice(most, p=(0.4, 0.35, 0.25)[:most]) + 1)
    for label in rng.choice(len(CLASSES), count, replace=False) + 1:
        _object(image, mask, CLASSES[label - 1], rng, size, count)
    for _ in range(int(rng.integers(0, 3))):
        _strand(image, mask, rng, size)
    return image, mask


def _material(name: str, rng: np.random.Generator, contrast: float) -> tuple[Array, Array]:
    base = np.asarray(_COLOURS[name], np.float32) * np.float32(rng.uniform(0.75, 1.2))
    base = base + rng.normal(0, 0.045, 3).astype(np.float32)
    other = base * np.float32(1 - contrast) + rng.normal(0, 0.05, 3).astype(np.float32)
    return base, other


def _grid(size: int) -> tuple[Array, Array]:
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    v, u = np.meshgrid(line, line, indexing="ij")
    return u, v


def _blend(pattern: Array, first: Array, second: Array) -> Array:
    return pattern[..., None] * first + (1 - pattern[..., None]) * second


_GROUND_TEXTURES: tuple[textures.Texture, ...] = (
    textures.stripes,
    textures.bricks,
    textures.dots,
    textures.scales,
    textures.checks,
)


def _ground_layer(rng: np.random.Generator, size: int) -> Array:
    """One ground: fractal noise, sometimes with a faint regular pattern of the objects' kinds."""
    first, second = _material(str(rng.choice(list(_COLOURS))), rng, rng.uniform(0.3, 0.6))
    coarse = textures.fractal(size, rng, int(rng.integers(2, 8)), 5)
    squeeze = rng.uniform(0.25, 1.0)  # grass and water are stretched noise
    if rng.random() < 0.5:
        height = max(8, int(size * squeeze))
        squeezed = cv2.resize(coarse[:height], (size, size), interpolation=cv2.INTER_LINEAR)
        coarse = np.asarray(squeezed, np.float32)
    pattern = 0.5 + 0.28 * coarse
    if rng.random() < 0.55:
        texture = _GROUND_TEXTURES[int(rng.integers(len(_GROUND_TEXTURES)))]
        u, v = _grid(size)
        turn = rng.uniform(0, np.pi)
        zoom = rng.uniform(2.0, 4.5)
        a = zoom * (np.cos(turn) * u + np.sin(turn) * v)
        b = zoom * (np.cos(turn) * v - np.sin(turn) * u)
        pattern = pattern + rng.uniform(0.2, 0.6) * (texture(a, b, rng) - 0.5)
    return _blend(np.clip(pattern, 0, 1), first, second)


def _ground(rng: np.random.Generator, size: int) -> Array:
    image = _ground_layer(rng, size)
    if rng.random() < 0.6:
        u, v = _grid(size)
        edge = rng.uniform(0.25, 0.75) + 0.05 * np.sin(u * rng.uniform(3, 14)) + 0.2 * rng.normal()
        soft = np.clip((v - edge) * size * rng.uniform(0.2, 1.0) + 0.5, 0, 1)[..., None]
        image = image * (1 - soft) + _ground_layer(rng, size) * soft
    return image


def _clutter(image: Array, rng: np.random.Generator, size: int) -> None:
    """A pebble or patch that belongs to no class."""
    u, v = _grid(size)
    x, y = rng.uniform(0, 1, 2)
    a, b = rng.uniform(0.02, 0.12, 2)
    turn = rng.uniform(0, np.pi)
    along = (np.cos(turn) * (u - x) + np.sin(turn) * (v - y)) / a
    across = (np.cos(turn) * (v - y) - np.sin(turn) * (u - x)) / b
    alpha = np.clip((1 - np.hypot(along, across)) * min(a, b) * size + 0.5, 0, 1)[..., None]
    first, second = _material(str(rng.choice(list(_COLOURS))), rng, 0.4)
    image[:] = image * (1 - alpha) + alpha * _blend(np.clip(0.5 - across / 2, 0, 1), first, second)


def _strand(image: Array, mask: NDArray[np.uint8], rng: np.random.Generator, size: int) -> None:
    """A thin blade that passes in front of everything; what it covers is background."""
    u, v = _grid(size)
    x, y = rng.uniform(0.1, 0.9, 2)
    turn = rng.uniform(0, np.pi)
    along = np.cos(turn) * (u - x) + np.sin(turn) * (v - y)
    across = np.cos(turn) * (v - y) - np.sin(turn) * (u - x) + rng.uniform(-1, 1) * along**2
    half = rng.uniform(0.008, 0.02)
    inside = np.minimum(half - np.abs(across), rng.uniform(0.15, 0.4) - np.abs(along))
    alpha = np.clip(inside * size + 0.5, 0, 1)
    colour, _ = _material(str(rng.choice(list(_COLOURS))), rng, 0.3)
    image[:] = image * (1 - alpha[..., None]) + alpha[..., None] * colour
    mask[alpha > 0.5] = 0


def _object(
    image: Array,
    mask: NDArray[np.uint8],
    kind: ObjectClass,
    rng: np.random.Generator,
    size: int,
    count: int,
) -> None:
    radius = 0.12 * 4.0 ** rng.uniform(0, 1.0 if count == 1 else 0.8)  # half-size, scale range 1:4
    x, y = rng.uniform(0.12, 0.88, 2)
    turn = rng.normal(0, 0.35) + (np.pi if rng.random() < 0.15 else 0.0)
    u, v = _grid(size)
    mirror = 1 if rng.random() < 0.5 else -1
    a = mirror * (np.cos(turn) * (u - x) + np.sin(turn) * (v - y)) / radius
    b = (np.cos(turn) * (v - y) - np.sin(turn) * (u - x)) / (radius * rng.uniform(0.85, 1.1))
    signed = kind.shape(a, b, rng) * radius * size
    slope = np.hypot(*np.gradient(signed))
    alpha = np.clip(0.5 - signed / np.maximum(slope, 0.35), 0, 1).astype(np.float32)
    surface = _surface(image, alpha, kind, (a, b), rng)
    _shadow(image, alpha, rng, size)
    image[:] = image * (1 - alpha[..., None]) + alpha[..., None] * surface
    mask[alpha > 0.5] = kind.label


def _surface(
    image: Array,
    alpha: Array,
    kind: ObjectClass,
    local: tuple[Array, Array],
    rng: np.random.Generator,
) -> Array:
    first, second = _material(str(rng.choice(list(kind.colours))), rng, rng.uniform(0.35, 0.6))
    if rng.random() < 0.35:  # half hidden: the object takes the colour of what lies behind it
        behind = image[alpha > 0.5].mean(axis=0) if (alpha > 0.5).any() else first
        share = np.float32(rng.uniform(0.4, 0.8))
        middle = (first + second) / 2
        first, second = (each + share * (behind - middle) for each in (first, second))
    pattern = kind.texture(*local, rng)
    grain = textures.fractal(alpha.shape[0], rng, 8, 3)
    light = 1.0 + rng.uniform(0.05, 0.25) * (local[0] * rng.uniform(-1, 1) - local[1])
    lit = _blend(np.clip(pattern + 0.12 * grain, 0, 1), first, second)
    return lit * np.clip(light, 0.6, 1.4)[..., None]


def _shadow(image: Array, alpha: Array, rng: np.random.Generator, size: int) -> None:
    shift = rng.uniform(-0.06, 0.06) * size, rng.uniform(0.0, 0.07) * size
    move = np.asarray([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
    cast = cv2.warpAffine(alpha, move, (size, size))
    cast = cv2.GaussianBlur(cast, (0, 0), size * rng.uniform(0.02, 0.05))
    image *= 1 - np.float32(rng.uniform(0.15, 0.5)) * cast[..., None]


def _develop(image: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Uneven light over everything, lens blur, sensor noise, eight bits."""
    size = image.shape[0]
    light = 1 + np.float32(rng.uniform(0.05, 0.2)) * textures.fractal(size, rng, 2, 2)
    image = image * np.clip(light, 0.55, 1.45)[..., None]
    image = np.asarray(
        cv2.GaussianBlur(image, (0, 0), size / IMAGE_SIZE * rng.uniform(0.3, 0.6)), image.dtype
    )
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.01, 0.03))
    return (np.clip(image + noise, 0, 1) * 255 + 0.5).astype(np.uint8)
