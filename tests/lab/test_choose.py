"""Choosing: on validation scenes alone, the best of what was tried, written for the tables."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from g4seg_pl.callbacks.run_record import describe
from g4seg_pl.core.background import Threshold
from g4seg_pl.core.steps import Correspondence
from g4seg_pl.evaluation.confusion import mean_overlap
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab.choose import GRID, choose
from g4seg_pl.lab.chooser import Chooser, best_threshold, with_values
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.report import write_report
from g4seg_pl.lab.runner import Runner
from g4seg_pl.lab.scores import THRESHOLDS
from g4seg_pl.lab.stages import Way
from g4seg_pl.lab.written import build_stages
from g4seg_pl.types import ConfigurationError

BLUR = {"class_path": "g4seg_pl.core.steps.Blur", "init_args": {"sigma": 2.0}}


def test_test_scenes_cannot_be_chosen_on(lab: Lab) -> None:
    with pytest.raises(ConfigurationError, match="val alone"):
        Chooser(lab, lab.source("degraded", "test", 2))


def test_the_best_of_the_tried_is_chosen(lab: Lab) -> None:
    found = lab.chosen["kinds"]["degraded"]["ways"]["blur"]
    chooser = Chooser(lab, lab.source("degraded", "val", 6, 0))
    settings = [with_values([BLUR], {"0.sigma": value}) for value in (0.0, 1.0)]
    tried = chooser.try_all(settings, lab.background("degraded").value)
    assert found["val_miou"] == pytest.approx(max(each.miou for each in tried), abs=1e-3)
    assert found["tried"] == 2


def test_the_feature_space_is_chosen_first_and_then_used(lab: Lab) -> None:
    found = lab.chosen["features"]
    gains = {each["features"]["init_args"]["level"]: each["val_gain"] for each in found["tried"]}
    best = max(gains, key=lambda level: gains[level])
    assert (found["init_args"]["level"], len(gains)) == (best, 2)
    assert isinstance(lab.features, VAEFeatures)
    assert lab.features.level == best
    # The same by hand: a runner on each space, without the wrapper that tries them.
    seed = lab.chosen["kinds"]["degraded"]["seed"]
    source, rule = lab.source("degraded", "val", 6, 0), Threshold(seed["background"])
    for level, gain in gains.items():
        ways = [
            Way(str(beta), (Correspondence(confidence_range=None, beta=beta),))
            for beta in (0.8, 0.3)
        ]
        curve = lab.runner(VAEFeatures(level)).run(ways, source, rule, curve=True)
        reached = max(best_threshold(curve[way.name])[1] for way in ways)
        assert reached - seed["val_miou"] == pytest.approx(gain, abs=2e-3)


def test_what_was_chosen_before_is_found_again_whatever_came_of_it(
    lab: Lab, grid_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    # A file as of other weights: another F than the first laboratory began with.
    space = {"class_path": "g4seg_pl.features.vae.VAEFeatures", "init_args": {"level": 1}}
    other = {**lab.chosen, "features": space}
    (results / "chosen.json").write_text(json.dumps(other))
    again = replace(lab, results=results, chosen_file=results / "chosen.json")
    again.forget_chosen()

    def computed(*_: object, **__: object) -> None:
        pytest.fail("computed what another laboratory had kept")

    monkeypatch.setattr(Runner, "_compute", computed)
    assert choose(again, grid_file) == lab.chosen


def test_what_was_chosen_stays_until_new_features_are_found(
    lab: Lab, grid_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chosen.json"
    path.write_text(lab.chosen_file.read_text())
    again = replace(lab, chosen_file=path)
    looked: list[Chooser] = []

    def killed(chooser: Chooser, _: object) -> None:
        looked.append(chooser)
        raise KeyboardInterrupt

    monkeypatch.setattr("g4seg_pl.lab.choose.choose_features", killed)
    with pytest.raises(KeyboardInterrupt):
        choose(again, grid_file)
    assert path.read_text() == lab.chosen_file.read_text()
    # And what is found does not depend on what F was before.
    assert describe(looked[0].lab.features) == describe(VAEFeatures())


def test_settings_without_the_features_they_were_chosen_with_are_refused(
    lab: Lab, grid_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "chosen.json"
    path.write_text(
        json.dumps({name: lab.chosen[name] for name in lab.chosen.keys() - {"features"}})
    )
    other = replace(lab, chosen_file=path)
    with pytest.raises(ConfigurationError, match=r"chosen\.json: features: none"):
        _ = other.features
    with pytest.raises(ConfigurationError, match=r"chosen\.json: features: none"):
        choose(other, grid_file, kinds=["degraded"], only=["blur"])
    assert choose(other, grid_file)["features"] == lab.chosen["features"]


def test_a_grid_without_features_says_which_it_chose_with(
    lab: Lab, grid_file: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    other = replace(lab, results=results, chosen_file=results / "chosen.json")
    choose(other, small_grid(grid_file, tmp_path))
    assert describe(other.features) == describe(VAEFeatures())
    assert "Chosen settings" in write_report(results).read_text()


def test_features_need_no_arguments(lab: Lab, tmp_path: Path) -> None:
    plain = {"class_path": "g4seg_pl.features.vae.VAEFeatures"}
    path = tmp_path / "chosen.json"
    path.write_text(json.dumps({**json.loads(lab.chosen_file.read_text()), "features": plain}))
    assert isinstance(replace(lab, chosen_file=path).features, VAEFeatures)


def test_features_that_are_none_are_refused(lab: Lab, tmp_path: Path) -> None:
    chosen = json.loads(lab.chosen_file.read_text()) | {"features": BLUR}
    path = tmp_path / "chosen.json"
    path.write_text(json.dumps(chosen))
    with pytest.raises(ConfigurationError, match="Blur extracts none"):
        _ = replace(lab, chosen_file=path).features


def test_the_curve_is_what_the_thresholds_give(lab: Lab) -> None:
    source = lab.source("degraded", "val", 6, 0)
    curve = lab.runner().run([Way("seed")], source, Threshold(0.5), curve=True)["seed"]
    value, miou = best_threshold(curve)
    plain = {
        each: lab.runner().run([Way("seed")], source, Threshold(each))["seed"][0]
        for each in (value, THRESHOLDS[3])
    }
    assert miou == pytest.approx(100 * mean_overlap(plain[value].overlaps))
    np.testing.assert_array_equal(curve[0].curve[:, 3], plain[THRESHOLDS[3]].overlaps)
    assert lab.background("degraded").value == value


def test_chains_are_put_together_from_chosen_parts(lab: Lab) -> None:
    way = lab.way("degraded", "blur+g4seg")
    parts = [*lab.way("degraded", "blur").stages, *lab.way("degraded", "g4seg").stages]
    assert list(way.stages) == parts
    assert lab.way("degraded_0_40", "g4seg").stages == lab.way("degraded", "g4seg").stages
    assert not lab.has("degraded", "blur+nothing")
    with pytest.raises(ConfigurationError, match="nothing"):
        lab.way("degraded", "blur+nothing")


def test_choosing_one_way_anew_keeps_the_others(lab: Lab, grid_file: Path) -> None:
    before = json.loads(lab.chosen_file.read_text())
    choose(lab, grid_file, kinds=["degraded"], only=["blur"])
    assert json.loads(lab.chosen_file.read_text()) == before


def small_grid(grid_file: Path, folder: Path) -> Path:
    """The grid with one way and nothing to choose F from."""
    plan = yaml.safe_load(grid_file.read_text())
    del plan["features"]
    plan["ways"] = {"blur": plan["ways"]["blur"]}
    grid = folder / "grid.yaml"
    grid.write_text(yaml.safe_dump(plan))
    return grid


def test_each_kind_says_what_it_was_chosen_on(lab: Lab, grid_file: Path, tmp_path: Path) -> None:
    grid, results = small_grid(grid_file, tmp_path), tmp_path / "results"
    results.mkdir()
    # As files were before kinds had a protocol of their own: the file's holds of all.
    before = copy.deepcopy(lab.chosen)
    for part in (before["features"], *before["kinds"].values()):
        part.pop("protocol", None)
    path = results / "chosen.json"
    path.write_text(json.dumps(before))
    assert (
        "On validation scenes 0 to 5; label thresholds: own." in write_report(results).read_text()
    )
    other = replace(lab, results=results, chosen_file=path)
    choose(other, grid, kinds=["degraded"], scenes=4)
    read = json.loads(path.read_text())
    kinds = {kind: found["protocol"]["split"] for kind, found in read["kinds"].items()}
    assert kinds == {
        "degraded": "validation scenes 0 to 3",
        "cross_attention": "validation scenes 0 to 5",
    }
    assert read["features"]["protocol"]["split"] == "validation scenes 0 to 5"
    assert read["kinds"]["cross_attention"]["ways"] == before["kinds"]["cross_attention"]["ways"]
    told = write_report(results).read_text()
    assert "degraded: on validation scenes 0 to 3; label thresholds: own." in told
    assert "cross_attention: on validation scenes 0 to 5; label thresholds: own." in told


def test_ways_of_a_kind_are_chosen_on_the_same_scenes(
    lab: Lab, grid_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "chosen.json"
    path.write_text(lab.chosen_file.read_text())
    other = replace(lab, chosen_file=path)
    with pytest.raises(
        ConfigurationError, match=r"degraded seeds that stay were chosen on.*0 to 5"
    ):
        choose(other, grid_file, kinds=["degraded"], scenes=4, only=["blur"])
    assert path.read_text() == lab.chosen_file.read_text()


def test_settings_of_another_generator_do_not_stay(
    lab: Lab, grid_file: Path, tmp_path: Path
) -> None:
    chosen = json.loads(lab.chosen_file.read_text())
    for part in (chosen, chosen["features"], *chosen["kinds"].values()):
        part["protocol"]["generator"] = "another"
    path = tmp_path / "chosen.json"
    path.write_text(json.dumps(chosen))
    other = replace(lab, chosen_file=path)
    with pytest.raises(
        ConfigurationError, match=r"cross_attention seeds would stay .* another gen"
    ):
        choose(other, grid_file, kinds=["degraded"])
    with pytest.raises(ConfigurationError, match=r"F of Eq\. 8 would stay"):
        choose(other, small_grid(grid_file, tmp_path))
    with pytest.raises(ConfigurationError, match=r"seeds that stay were chosen on.*another"):
        choose(other, grid_file, only=["features", "blur"])
    assert json.loads(path.read_text()) == chosen
    assert choose(other, grid_file) == lab.chosen


def test_a_way_can_be_the_best_of_others(lab: Lab, grid_file: Path, tmp_path: Path) -> None:
    plan = yaml.safe_load(grid_file.read_text())
    plan["ways"] = {"blur": plan["ways"]["blur"], "feature-nn": plan["ways"]["feature-nn"]}
    plan["ways"]["best"] = {"of": ["blur", "feature-nn"]}
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(plan, sort_keys=False))
    other = replace(lab, chosen_file=tmp_path / "chosen.json")
    ways = choose(other, grid, kinds=["degraded"])["kinds"]["degraded"]["ways"]
    assert ways["best"]["val_miou"] == max(ways[name]["val_miou"] for name in plan["ways"])
    plan["ways"] = {"best": {"of": ["blur"]}}
    grid.write_text(yaml.safe_dump(plan, sort_keys=False))
    with pytest.raises(ConfigurationError, match="must stand before it"):
        choose(other, grid, kinds=["degraded"])


def test_stage_minus_one_is_the_last() -> None:
    changed = with_values([BLUR, copy.deepcopy(BLUR)], {"-1.sigma": 5.0})
    assert [each["init_args"]["sigma"] for each in changed] == [2.0, 5.0]


@pytest.mark.parametrize("axis", ["sigma", "1.sigma", "x.sigma", "0."])
def test_an_axis_that_leads_nowhere_is_named(axis: str) -> None:
    with pytest.raises(ConfigurationError, match="axis"):
        with_values([BLUR], {axis: 1})


def test_the_repositorys_grid_can_be_built() -> None:
    ways = yaml.safe_load(GRID.read_text())["ways"]
    starts: dict[str, list[Any]] = {}
    for name, plan in ways.items():
        if "of" in plan:
            starts[name] = starts[plan["of"][-1]]
            continue
        parts = plan.get("base", name).split("+")
        starts[name] = plan.get("stages") or [stage for part in parts for stage in starts[part]]
        start = starts[name]
        build_stages(start, {"clip": "folder"})
        for axis, values in (plan.get("axes") or {}).items():
            for value in values:
                build_stages(with_values(start, {axis: value}), {"clip": "folder"})


def test_the_report_is_written_from_files(lab: Lab) -> None:
    text = write_report(lab.results).read_text()
    assert "g4seg" in text
    assert "Settings were chosen on validation scenes" in text


def test_the_report_shows_the_loop_as_the_loop_wrote_it(lab: Lab, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "chosen.json").write_text(lab.chosen_file.read_text())
    (results / "loop.json").write_text('{"rows": [{"name": "seed", "miou": 1.0, "miou_se": 0.5}]}')
    (results / "loop.md").write_text("| trained on | mIoU |\n|---|---|\n| seed | 1.00 |\n")
    text = write_report(results).read_text()
    assert "\n\n| trained on | mIoU |\n|---|---|\n| seed | 1.00 |\n" in text
