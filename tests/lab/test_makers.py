"""A slice of the table of seeds, by the makers and small models in the repository."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from g4seg_pl.core.background import compose_label
from g4seg_pl.evaluation.confusion import mean_overlap
from g4seg_pl.lab import __main__ as command
from g4seg_pl.lab import cam_weights as training
from g4seg_pl.lab.cache import Store
from g4seg_pl.lab.cam_weights import CamRecipe, cam_weights
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.makers import MadeSource
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.scores import pooled
from g4seg_pl.lab.stages import DenseCRF, Way
from g4seg_pl.lab.table import read_table
from g4seg_pl.lab.tables import makers as table_of_makers
from g4seg_pl.lab.tables.makers import LABELS, choose_labels, makers, rule_of, rule_text
from g4seg_pl.main import main
from g4seg_pl.world.folders import CLIP

# LightningCLI 2.6 calls what jsonargparse 4.53 has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
REPOSITORY = Path(__file__).parents[2]
RECIPE = CamRecipe(parts=2, easy_parts=1, scenes=8, batch_size=4, crop=32, longer_side=(32, 40))


@pytest.fixture(scope="module")
def made(lab: Lab, sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A laboratory with the repository's CLIP, a tiny generator and chosen CRFs."""
    folder = tmp_path_factory.mktemp("makers")
    places = {"results": folder, "chosen_file": folder / "chosen.json"}
    models, store = Models(sd1_folder, CLIP, device="cpu"), Store(folder / "store")
    found = replace(lab, models=models, store=store, images=6, noise_seeds=(0,), **places)
    chosen = copy.deepcopy(lab.chosen)
    crf = {"class_path": "g4seg_pl.lab.stages.DenseCRF", "init_args": {"scale": 0.13}}
    for kind in chosen["kinds"].values():
        kind["ways"]["dcrf"] = {"stages": [crf], "background": None}
    found.chosen_file.write_text(json.dumps(chosen))
    return found


@pytest.mark.slow
def test_the_table_has_every_maker_with_and_without_the_crf(
    made: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr(table_of_makers, "CRF_BACKGROUNDS", (None, 0.5))
    table = makers(made, RECIPE, scenes=4)
    table.write(tmp_path)
    assert read_table(tmp_path / "makers.json").markdown() == table.markdown()
    rows = {(row["seeds"], row["way"]): row for row in table.rows}
    ways = ("seed", "g4seg", "dcrf", "g4seg+dcrf", "best", "best+dcrf", "feature-nn")
    assert set(rows) == {(label, way) for label in LABELS.values() for way in ways}
    assert all(np.isfinite(row["mIoU"]) and row["gain_se"] >= 0 for row in table.rows)
    assert all(rows[label, "seed"]["gain"] == 0 for label in LABELS.values())
    assert str(rows["CLIP-ES", "seed"]["label rule"]).startswith("(1 - max)^")
    assert "most probable" in str(rows["CAM", "dcrf"]["label rule"])
    before = made.runner().computed
    assert makers(made, RECIPE, scenes=4).rows == table.rows
    assert made.runner().computed == before


@pytest.mark.parametrize("name", ["clip_es", "maskclip", "sclip"])
def test_seeds_are_those_of_predict(
    name: Any, made: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    configs = [f"configs/seeds/{name}.yaml", f"configs/seeds/world/{name}.yaml"]
    words = ["predict", "-c", configs[0], "-c", configs[1], "--data.count", "3"]
    words += ["--trainer.accelerator", "cpu", "--out", str(tmp_path)]
    words += ["--model.background", "g4seg_pl.core.background.Threshold"]
    assert main([*words, "--model.background.init_args.value", "0.5"]) == 0
    source = MadeSource(made.models, made.store, name, "test", 3, 0, 0.5)
    for sample in source.samples(source.ids):
        saved = np.load(tmp_path / "soft" / f"{sample.image_id}.npy", allow_pickle=True).item()
        assert tuple(saved["keys"] + 1) == sample.seed.class_ids
        maps = torch.from_numpy(saved["attn_highres"].astype(np.float32))
        assert torch.allclose(maps, sample.seed.scores, atol=2e-3)


def test_a_named_threshold_leaves_the_labels_that_the_maker_makes(made: Lab) -> None:
    """Classes that win nowhere above it have no map; where the rest lie does not change."""
    loose = MadeSource(made.models, made.store, "maskclip", "val", 3)
    strict = MadeSource(made.models, made.store, "maskclip", "val", 3, background=0.8)
    for first, second in zip(loose.samples(loose.ids), strict.samples(strict.ids), strict=True):
        rule = rule_of("maskclip", 0.8)
        labels = [compose_label(s.seed.scores, s.seed.class_ids, rule) for s in (first, second)]
        assert torch.equal(*labels)
        assert set(second.seed.class_ids) < set(first.seed.class_ids)


@pytest.mark.slow
def test_the_background_before_a_crf_is_the_best_of_those_tried(
    made: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pydensecrf")
    found = {}
    for value in (0.3, 0.9):
        monkeypatch.setattr(table_of_makers, "CRF_BACKGROUNDS", (value,))
        found[value] = _crf(choose_labels(made, "clip_es", RECIPE, 4).ways)
        assert found[value].background == value
    monkeypatch.setattr(table_of_makers, "CRF_BACKGROUNDS", (0.9, 0.3))
    chosen = choose_labels(made, "clip_es", RECIPE, 4)
    source = MadeSource(made.models, made.store, "clip_es", "val", 4, 0, chosen.threshold, RECIPE)
    ways = [Way(str(value), (stage,)) for value, stage in found.items()]
    runs = made.runner().run(ways, source, chosen.rule, (0,))
    mious = {value: mean_overlap(pooled(runs[str(value)]).overlaps) for value in found}
    assert len(set(mious.values())) == 2
    assert _crf(chosen.ways).background == max(mious, key=mious.__getitem__)


def _crf(ways: tuple[Way, ...]) -> DenseCRF:
    (stage,) = next(way for way in ways if way.name == "dcrf").stages
    assert isinstance(stage, DenseCRF)
    return stage


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.95])
def test_the_power_rule_has_the_labels_of_its_threshold(threshold: float) -> None:
    rule = rule_of("clip_es", threshold)
    maps = torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(0))
    expected = torch.where(maps.amax(0) > threshold, maps.argmax(0) + 4, 0)
    assert torch.equal(compose_label(maps, (4, 5), rule).long(), expected)


def test_rules_are_told_beside_the_number() -> None:
    crf, own = DenseCRF(), DenseCRF(background=0.4)
    rule = rule_of("cam", 0.2)
    assert rule_text("cam", rule, Way("blur", background=0.3)) == "threshold 0.3"
    assert rule_text("cam", rule, Way("dcrf", (crf,))) == "most probable, threshold 0.2 before"
    assert rule_text("cam", rule, Way("dcrf", (own,))) == "most probable, threshold 0.4 before"
    half = rule_of("clip_es", 0.5)
    assert rule_text("clip_es", half, Way("seed", background=0.5)) == "(1 - max)^1.0"
    assert math.isclose(half.power, 1.0)  # type: ignore[attr-defined]


def test_a_broken_training_goes_on_behind_its_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.load(cam_weights(Store(tmp_path / "whole"), RECIPE), weights_only=True)
    store = Store(tmp_path / "broken")
    trained: list[int] = []
    plain = training.ScenesCam.training_step

    def breaks(self: training.ScenesCam, batch: Any, batch_idx: int = 0) -> Any:
        epoch = self.trainer.current_epoch
        trained.append(epoch)
        if trained.count(1) == 1:
            raise ConnectionError
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(training.ScenesCam, "training_step", breaks)
    with pytest.raises(ConnectionError):
        cam_weights(store, RECIPE)
    path = cam_weights(store, RECIPE)
    assert trained == [0, 0, 1, 1, 1]
    assert [each.name for each in path.parent.iterdir()] == ["classifier.pt"]
    resumed = torch.load(path, weights_only=True)
    assert resumed.keys() == whole.keys()
    # Not bit by bit: the order within a part is drawn anew.
    assert (resumed["head.weight"] - whole["head.weight"]).abs().max() < 0.1


def test_the_command_trains_the_classifier_that_makers_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "CamRecipe", lambda: RECIPE)
    assert command.main(["cam", "--store", str(tmp_path), "--quiet"]) == 0
    path = Path(capsys.readouterr().out.strip())
    before = path.stat().st_mtime_ns
    assert cam_weights(Store(tmp_path), RECIPE) == path
    assert path.stat().st_mtime_ns == before, "trained twice"
