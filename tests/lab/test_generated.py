"""What ways of one batch generate alike is generated once, and is the same as made alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.background import Threshold
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.correspondence import nearest_neighbours
from g4seg_pl.core.generation import Rows
from g4seg_pl.core.grounding import Grounding
from g4seg_pl.core.injection import Injection
from g4seg_pl.core.steps import Blur, Correspondence, UpdateStep
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab.cache import Store
from g4seg_pl.lab.controls import WithFeatures
from g4seg_pl.lab.generated import Generated, KeptPasses
from g4seg_pl.lab.runner import Runner
from g4seg_pl.lab.sources import SceneSource
from g4seg_pl.lab.stages import Way

RULE = Threshold(0.5)


def scenes(runner: Runner, count: int = 4, **options: object) -> SceneSource:
    return SceneSource(runner.models, runner.store, "degraded", "val", count, **options)


def test_what_is_generated_alike_is_generated_once(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Correspondence(confidence_range=None)
    changes: dict[str, dict[str, object]] = {
        "plain": {},
        "half": {"beta": 0.5},
        "same place": {"matching": "aligned"},
        "coarse": {"match_size": 4, "confidence_range": (0.1, 0.9), "carry": "values"},
        "earlier": {"timestep": 200},
        "not injected": {"injection_weight": 0.0},
    }
    ways = [Way(name, (replace(step, **each),)) for name, each in changes.items()]
    ways.append(Way("deep", (WithFeatures([step], VAEFeatures(level=0)),)))
    alone = {
        way.name: Runner(runner.models, Store(tmp_path / way.name)).run(
            [way], scenes(runner), RULE, (0, 1)
        )[way.name]
        for way in ways
    }
    generate, calls = Correspondence.generate, []

    def counted(self: Correspondence, rows: Rows, context: RefinementContext) -> torch.Tensor:
        calls.append((self.timestep, self.injection_weight))
        return generate(self, rows, context)

    matches: list[torch.Tensor] = []

    def matched(queries: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        matches.append(queries)
        return nearest_neighbours(queries, references)

    extract, looked = Correspondence.extract, []

    def noted(self: Correspondence, *rest: Any) -> torch.Tensor:
        looked.append(self.timestep)
        return extract(self, *rest)

    monkeypatch.setattr(Correspondence, "extract", noted)
    monkeypatch.setattr(Correspondence, "generate", counted)
    monkeypatch.setattr("g4seg_pl.core.steps.nearest_neighbours", matched)
    together = runner.run(ways, scenes(runner), RULE, (0, 1))
    # Three kinds of images under two noise seeds, in as many passes as the memory bound makes.
    assert len(set(calls)) == 3
    passes = calls.count((400, 10.0))
    assert passes == calls.count((200, 10.0)) == calls.count((400, 0.0))
    # Matched anew: all but `half`, which mixes alike, and `same place`, which matches nothing.
    assert len(matches) == 5 * passes
    # Features of three kinds of images and, deep, other ones of the first.
    assert len(looked) == 4 * passes
    for name, runs in together.items():
        for one, two in zip(runs, alone[name], strict=True):
            np.testing.assert_array_equal(one.overlaps, two.overlaps)
        assert all(run.noisy for run in runs)
    # A spared generation counts among the seconds all the same.
    for name in ("half", "same place", "coarse", "deep"):
        assert together[name][1].seconds.sum() > 0.2 * together["plain"][1].seconds.sum()


def test_a_pass_is_made_once_whatever_reads_its_attention(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word, flow = Grounding(), Affinity()
    changes: dict[str, UpdateStep] = {
        "word": word,
        "less of it": replace(word, mixing=0.2, spread=False),
        "word at another t": replace(word, timestep=300),
        "flow": flow,
        "sharper": replace(flow, power=3.0, norm="range"),
        "flow under the classes": replace(flow, prompt="classes"),
        "guided": Correspondence(guidance_scale=3.0),
        "more": Correspondence(guidance_scale=7.5),
    }
    ways = [Way(name, (step,)) for name, step in changes.items()]
    ways.append(Way("blurred first", (Blur(1.0), word)))
    alone = {
        way.name: Runner(runner.models, Store(tmp_path / way.name)).run(
            [way], scenes(runner), RULE, (0, 1)
        )[way.name]
        for way in ways
    }
    made: list[str] = []

    def noted(name: str) -> None:
        plain = getattr(StableDiffusion, name)

        def call(*args: object, **kwargs: object) -> object:
            made.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(StableDiffusion, name, call)

    for name in ("attention", "self_attention", "denoise"):
        noted(name)
    together = runner.run(ways, scenes(runner), RULE, (0, 1))
    # Two noise seeds, each with two timesteps, two prompts, and the passes with and without text.
    assert [made.count(each) for each in ("attention", "self_attention", "denoise")] == [4, 4, 4]
    for name, runs in together.items():
        for one, two in zip(runs, alone[name], strict=True):
            np.testing.assert_array_equal(one.overlaps, two.overlaps)
    assert together["less of it"][1].seconds.sum() > 0.2 * together["word"][1].seconds.sum()


def test_what_is_kept_has_a_bound_and_passes_for_gradients_are_not() -> None:
    kept = Generated(most=100)
    for name in ("one", "two", "one", "three"):
        kept.once(name, lambda: torch.zeros(10))
    asked: list[str] = []
    for name in ("one", "two", "three"):
        kept.once(name, lambda name=name: asked.append(name) or torch.zeros(10))
    assert asked[0] == "two", "what was asked for longest ago goes first"
    generator = Mock()
    generator.denoise.side_effect = lambda *_: torch.zeros(1)
    passes = KeptPasses(generator, Generated())
    call = (torch.zeros(1, 4, 8, 8), 400, torch.zeros(1, 7, 16))
    passes.denoise(*call)
    passes.denoise(*call)
    assert generator.denoise.call_count == 2
    with torch.no_grad():
        first = passes.denoise(*call)
        assert passes.denoise(*call) is first
        passes.denoise(call[0] + 1, *call[1:])
        mask, token = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 7)
        passes.denoise(*call, Injection(mask, token, 10.0))
        passes.denoise(*call, Injection(mask / 2, token, 10.0))
        passes.denoise(*call, Injection(mask, token, 20.0))
    assert generator.denoise.call_count == 7
    assert passes.image_size is generator.image_size
