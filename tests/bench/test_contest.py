"""The contestants: plain gives g4seg's masks, and floor runs each network as often as it says."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from g4seg_pl.bench.contest import Contest
from g4seg_pl.bench.floor import Floor
from g4seg_pl.bench.plain import Plain
from g4seg_pl.bench.setting import Setting
from g4seg_pl.core.steps import Correspondence
from g4seg_pl.main import main
from g4seg_pl.module import G4SegModule


@pytest.fixture(scope="module")
def exact(setting: Setting) -> Contest:
    """The contest in float32, its models loaded."""
    return Contest(setting, torch.float32)


def largest_difference(contestants: Contest, plain: Plain, name: str) -> float:
    masks = contestants._run_stage(name)[1][0]
    soft = plain.refine(contestants._sample(name))
    return float((soft - masks.foreground).abs().max())


def test_plain_gives_the_same_masks_and_would_not_without_injection(exact: Contest) -> None:
    plain = exact.plain
    assert plain is not None
    assert largest_difference(exact, plain, "image0002") < 1e-4
    seed = exact._sample("image0002").seed.scores
    assert float((exact._run_stage("image0002")[1][0].foreground - seed).abs().max()) > 1e-2
    for changed in ({"injection_weight": 0.0}, {"timestep": 300}, {"beta": 0.8}):
        plain.step = replace(Correspondence(), **changed)
        assert largest_difference(exact, plain, "image0002") > 1e-3, changed
    plain.step = Correspondence()


def test_floor_runs_what_the_method_needs(exact: Contest) -> None:
    floor = Floor(exact.floor.generator, exact.stage.module.features, batch=2)
    seen: Counter[str] = Counter()
    networks = {
        "unet": floor.generator.unet,
        "encoder": floor.generator.vae.encoder,
        "decoder": floor.generator.vae.decoder,
        "clip": floor.clip.vision_model,
    }

    def count(name: str) -> object:
        def hook(_: object, given: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
            first = given[0] if given else kwargs["pixel_values"]
            assert isinstance(first, torch.Tensor)
            seen[name] += len(first)

        return networks[name].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [count(name) for name in networks]
    floor.image(3)
    for handle in handles:
        handle.remove()
    assert seen == {"unet": 3, "decoder": 3, "encoder": 1, "clip": 4}


def test_floor_runs_where_the_stage_does(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning takes a module's weights off the device when a run has ended."""
    away: list[bool] = []
    moved, ran = G4SegModule.to, Floor.image

    def to(module: G4SegModule, *args: object, **kwargs: object) -> G4SegModule:
        away.clear()
        return moved(module, *args, **kwargs)

    def image(floor: Floor, masks: int) -> None:
        assert not away
        ran(floor, masks)

    monkeypatch.setattr(G4SegModule, "cpu", lambda module: away.append(True) or module)
    monkeypatch.setattr(G4SegModule, "to", to)
    monkeypatch.setattr(Floor, "image", image)
    contestants = Contest(replace(setting, plain_images=0), torch.float32)
    assert away, "Lightning no longer does so"
    *_, found = islice(contestants.run(), 2)  # the floor goes before the stage, then behind it
    assert len(found.spent["floor"]) == 2


@pytest.mark.slow
def test_command_answers_every_question_of_the_contest(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = ["bench", "--size", "tiny", "--only", "contest", "--json", str(file)]
    assert main([*words, "--images", "3", "--rounds", "1", "--work", str(tmp_path)]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["contest: soft maps, float32"]["ok"] is True
    assert rows["contest: labels, float32"]["ok"] is True
    for name in ("g4seg / floor", "plain / g4seg", "g4seg, a mask", "plain, memory"):
        row = rows[f"contest: {name}"]
        assert row["value"] > 0
        assert row["bar"] is None, "overhead is all there is in a tiny model"
