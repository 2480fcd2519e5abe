"""Ways that differ only in what they do with a generated image generate it once."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from g4seg_pl.callbacks.run_record import describe
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.generation import Rows
from g4seg_pl.core.steps import Correspondence
from g4seg_pl.lab.controls import WithFeatures

# What the paper's update does after it has generated; every other setting tells images apart.
AFTERWARDS = ("beta", "confidence_range", "matching", "match_size", "exclude_radius", "carry")
_DECIDING = tuple(each.name for each in fields(Correspondence) if each.name not in AFTERWARDS)


@dataclass
class Generated:
    """Images that the ways of one batch have generated under one noise seed, and their matches.

    Attributes:
        spared: seconds that ways were spared so far, because an earlier one had made the same.
    """

    spared: float = 0.0
    _made: dict[str, tuple[Tensor, float]] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what was made under a key, or make it."""
        if key in self._made:
            made, seconds = self._made[key]
            self.spared += seconds
            return made
        started = time.perf_counter()
        made = make()
        self._made[key] = made, time.perf_counter() - started
        return made


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

    def _key(self, rows: Rows) -> str:
        settings = [getattr(self, name) for name in _DECIDING]
        digest = hashlib.sha256(repr([settings, rows.owner, rows.prompts, rows.names]).encode())
        for masks in (rows.foreground, rows.tokens):
            digest.update(masks.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def sharing(step: Any, generated: Generated) -> Any:
    """Return a step that takes its images from earlier ways; one that cannot is left as it is."""
    if type(step) is Correspondence:  # its subclasses generate otherwise
        plain = {each.name: getattr(step, each.name) for each in fields(step)}
        return SharedCorrespondence(**plain, generated=generated)
    if isinstance(step, WithFeatures):
        return replace(step, steps=[sharing(each, generated) for each in step.steps])
    return step
