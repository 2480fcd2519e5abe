"""Ways that differ only in what they do with a pass, or a generated image, make it once."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from g4seg_pl.callbacks.run_record import describe
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.generation import Rows
from g4seg_pl.core.injection import Injection
from g4seg_pl.core.protocols import AttentionRecord, Generator
from g4seg_pl.core.steps import Correspondence
from g4seg_pl.lab.controls import WithFeatures

Made = TypeVar("Made")
# Attention of a pass on 32 rows takes 30 MB at the world's size, an image of each row 1.5 MB.
KEPT_BYTES = 2**29

# What the paper's update does after it has generated; every other setting tells images apart.
AFTERWARDS = ("beta", "confidence_range", "matching", "match_size", "exclude_radius", "carry")
_DECIDING = tuple(each.name for each in fields(Correspondence) if each.name not in AFTERWARDS)


@dataclass
class Generated:
    """What the ways of one batch have generated under one noise seed: passes, images, matches.

    Attributes:
        spared: seconds that ways were spared so far, because an earlier one had made the same.
        hidden: how often something was taken whose making drew noise, which its taker did not.
        most: bytes kept at most; what was not asked for longest goes first.
    """

    spared: float = 0.0
    hidden: int = 0
    most: int = KEPT_BYTES
    _made: dict[str, tuple[Any, float, int]] = field(default_factory=dict, init=False, repr=False)
    _bytes: int = field(default=0, init=False, repr=False)

    def once(self, key: str, make: Callable[[], Made], *, noisy: bool = True) -> Made:
        """Return what was made under a key, or make it.

        Args:
            key: everything that decides it.
            make: makes it.
            noisy: noise may be drawn in it.
        """
        if key in self._made:
            self.hidden += noisy
            found = self._made[key] = self._made.pop(key)  # those used last stand last
            self.spared += found[1]
            made: Made = found[0]
            return made
        started, spared = time.perf_counter(), self.spared
        made = make()
        # What a part of it was spared belongs to its price.
        seconds = time.perf_counter() - started + self.spared - spared
        self._keep(key, made, seconds)
        return made

    def _keep(self, key: str, made: Any, seconds: float) -> None:
        self._made[key] = made, seconds, _size(made)
        self._bytes += self._made[key][2]
        while self._bytes > self.most and len(self._made) > 1:
            self._bytes -= self._made.pop(next(iter(self._made)))[2]


class KeptPasses:
    """A generator that makes the same pass once; all else is the generator's own.

    The attention to a word, or of an image to itself, is the same for every way that reads it at
    one timestep under one noise, whatever the masks. Whoever asks for a pass has drawn its noise.

    Args:
        generator: that passes are made with.
        generated: where they are kept.
    """

    def __init__(self, generator: Generator, generated: Generated) -> None:
        self._generator = generator
        self._generated = generated

    def __getattr__(self, name: str) -> Any:
        """Return the generator's own."""
        return getattr(self._generator, name)

    def denoise(
        self,
        noisy: Tensor,
        timestep: int,
        embeddings: Tensor,
        injection: Injection | None = None,
        **others: Any,
    ) -> Tensor:
        """Return the raw output of one U-Net pass; a pass for a gradient is made every time."""

        def make() -> Tensor:
            return self._generator.denoise(noisy, timestep, embeddings, injection, **others)

        if torch.is_grad_enabled() or others:
            return make()
        injected = [] if injection is None else _values(injection)
        key = digest("denoise", noisy, timestep, embeddings, *injected)
        return self._generated.once(key, make, noisy=False)

    def self_attention(
        self, noisy: Tensor, timestep: int, embeddings: Tensor
    ) -> list[AttentionRecord]:
        """Return queries and keys of every self-attention layer of one pass."""
        make = self._generator.self_attention
        key = digest("self-attention", noisy, timestep, embeddings)
        return self._generated.once(key, lambda: make(noisy, timestep, embeddings), noisy=False)

    def attention(
        self, noisy: Tensor, timestep: int, embeddings: Tensor
    ) -> tuple[list[AttentionRecord], list[AttentionRecord]]:
        """Return those of every self-attention and of every cross-attention layer."""
        make = self._generator.attention
        key = digest("attention", noisy, timestep, embeddings)
        return self._generated.once(key, lambda: make(noisy, timestep, embeddings), noisy=False)


def digest(*parts: Any) -> str:
    """Return a hash of tensors by what they hold and of all else by how it is written."""
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            hashed.update(repr((part.shape, part.dtype)).encode())
            # As bytes, since NumPy has no bfloat16.
            hashed.update(part.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        else:
            hashed.update(repr(part).encode())
    return hashed.hexdigest()


def _values(record: Any) -> list[Any]:
    return [getattr(record, each.name) for each in fields(record)]


def _size(made: Any) -> int:
    """Return how many bytes tensors take, those within lists and records included."""
    if isinstance(made, Tensor):
        return made.numel() * made.element_size()
    if isinstance(made, AttentionRecord):
        return _size(made.query) + _size(made.key)
    return sum(_size(each) for each in made) if isinstance(made, list | tuple) else 0


@dataclass(frozen=True)
class SharedCorrespondence(Correspondence):
    """The paper's update, its images and matches taken from an earlier way where there is one.

    Attributes:
        generated: where they are kept.
    """

    generated: Generated = field(default_factory=Generated)

    def generate(self, rows: Rows, context: RefinementContext) -> Tensor:
        """Return x̃₀ of each row, as the plain update generates it."""
        generate = super().generate
        return self.generated.once(self._key(rows), lambda: generate(rows, context))

    def compare(self, images: Tensor, rows: Rows, context: RefinementContext) -> Tensor:
        """Return δ of each row, as the plain update finds it."""
        compare = super().compare
        how = (self.matching, self.match_size, describe(context.features))
        key = f"{how} {self._key(rows)}"
        return self.generated.once(key, lambda: compare(images, rows, context))

    def extract(self, images: Tensor, rows: Rows, context: RefinementContext) -> Tensor:
        """Return F of each row's image, whatever grid it is matched on."""
        extract = super().extract
        key = f"{describe(context.features)} {self._key(rows)}"
        return self.generated.once(key, lambda: extract(images, rows, context))

    def _key(self, rows: Rows) -> str:
        settings = [getattr(self, name) for name in _DECIDING]
        told = [settings, rows.owner, rows.prompts, rows.names]
        return digest(told, rows.foreground, rows.tokens)


def sharing(step: Any, generated: Generated) -> Any:
    """Return a step that takes its images from earlier ways; one that cannot is left as it is."""
    if type(step) is Correspondence:  # its subclasses generate otherwise
        plain = {each.name: getattr(step, each.name) for each in fields(step)}
        return SharedCorrespondence(**plain, generated=generated)
    if isinstance(step, WithFeatures):
        return replace(step, steps=[sharing(each, generated) for each in step.steps])
    return step
