"""Every update step can be written down in YAML as class_path and init_args."""

from dataclasses import MISSING, fields
from typing import Any

import pytest
from jsonargparse import auto_cli

from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.confidence import Averaged
from g4seg_pl.core.controls import (
    ColourAffinity,
    EdgeFilter,
    FeatureAffinity,
    FlatInjection,
    OtherClass,
    OtherLatent,
    RandomWalk,
)
from g4seg_pl.core.evidence import ClassEvidence
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.likelihood import ChooseByLikelihood
from g4seg_pl.core.null_text import NullTextCorrespondence
from g4seg_pl.core.steps import Blur, Correspondence, NestedStep

PLAIN = [
    NullTextCorrespondence,
    Affinity,
    Gradient,
    ColourAffinity,
    FeatureAffinity,
    RandomWalk,
    EdgeFilter,
]
WRAPPERS = [Averaged, FlatInjection, OtherLatent, OtherClass, ChooseByLikelihood]


def _refine(update: list[NestedStep] | None = None) -> list[NestedStep] | None:
    return update


def _parse(text: str) -> list[Any]:
    return list(auto_cli(_refine, args=[f"--config={text}"], as_positional=False))


@pytest.mark.parametrize("kind", PLAIN)
def test_a_class_path_alone_gives_the_defaults(kind: type) -> None:
    assert _parse(f"update: [{{class_path: {kind.__module__}.{kind.__name__}}}]") == [kind()]


@pytest.mark.parametrize("kind", [*PLAIN, *WRAPPERS])
def test_fields_are_documented(kind: type) -> None:
    documented = "".join(ancestor.__doc__ or "" for ancestor in kind.__mro__)
    missing = [f.name for f in fields(kind) if f"\n        {f.name}:" not in documented]
    own = [name for name in missing if f"\n    {name}:" not in documented]
    assert not own
    required = [f.name for f in fields(kind) if f.default is MISSING]
    assert set(required) <= {"steps", "candidates", "names"}


def test_options_and_nested_steps_are_parsed() -> None:
    text = """
update:
- class_path: g4seg_pl.core.affinity.Affinity
  init_args: {level_weights: [1.0, 0.5], layer_weights: {up_blocks: 1.0}, form: heads, power: 4}
- class_path: g4seg_pl.core.gradient.Gradient
  init_args: {timesteps: [400, 600], rule: adam, trust_region: 0.2}
- class_path: g4seg_pl.core.likelihood.ChooseByLikelihood
  init_args:
    margin: 1
    evidence: {draws: 2, word_weight: 1.0}
    candidates:
    - - class_path: g4seg_pl.core.steps.Correspondence
        init_args: {beta: 0.8}
    - - class_path: g4seg_pl.core.confidence.Averaged
        init_args:
          steps: [{class_path: g4seg_pl.core.gradient.Gradient}]
      - class_path: g4seg_pl.core.steps.Blur
- class_path: g4seg_pl.core.controls.OtherClass
  init_args: {steps: [{class_path: g4seg_pl.core.affinity.Affinity}], names: [dog, cat]}
"""
    affinity, gradient, choice, other = _parse(text)
    assert affinity == Affinity(
        level_weights=(1.0, 0.5), layer_weights={"up_blocks": 1.0}, form="heads", power=4.0
    )
    assert gradient == Gradient(timesteps=(400, 600), rule="adam", trust_region=0.2)
    expected = [[Correspondence(beta=0.8)], [Averaged([Gradient()]), Blur()]]
    judge = ClassEvidence(draws=2, word_weight=1.0)
    assert choice == ChooseByLikelihood(expected, margin=1.0, evidence=judge)
    assert other == OtherClass([Affinity()], ["dog", "cat"])
