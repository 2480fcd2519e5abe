"""`g4seg compare` and `g4seg paper`: every table of the paper in the world, and both on data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fake_voc import write_voc

from datamodules import VOCDataModule
from g4seg_pl.callbacks.run_record import describe
from g4seg_pl.core.background import Threshold
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab import compare, paper
from g4seg_pl.lab.laboratory import CHOSEN, Lab
from g4seg_pl.lab.paper_table import ON_DATA
from g4seg_pl.lab.runner import Runner
from g4seg_pl.lab.sources import DataSource
from g4seg_pl.lab.table import Table, read_table
from g4seg_pl.main import main
from g4seg_pl.types import ConfigurationError

PLANS = {path.stem: yaml.safe_load(path.read_text()) for path in paper.CONFIGS.glob("*-*.yaml")}
PAPER = sorted(name for name, plan in PLANS.items() if "columns" not in plan)


def places(lab: Lab, folder: Path) -> dict[str, Any]:
    return {"clip": lab.models.clip, "chosen": lab.chosen_file, "resamples": 20} | {
        "store": lab.store.root,
        "out": folder / "out",
        "noise_seeds": 2,
    }


def test_compare_in_the_world(lab: Lab, tmp_path: Path) -> None:
    model = str(lab.models.generator)
    options = places(lab, tmp_path) | {"model": model, "kind": "degraded", "images": 12}
    assert compare.compare("g4seg,blur,blur+g4seg", **options) == 0
    table = read_table(tmp_path / "out" / "compare.json")
    assert [row["way"] for row in table.rows] == ["seed", "g4seg", "blur", "blur+g4seg"]
    assert all(row["s/mask"] > 0 for row in table.rows)
    with pytest.raises(ConfigurationError, match="nothing"):
        compare.compare("nothing", **options)


def test_compare_on_a_data_module(lab: Lab, tmp_path: Path) -> None:
    write_voc(tmp_path)
    data = VOCDataModule(tmp_path, tmp_path / "cam_out", num_workers=0)
    options = places(lab, tmp_path) | {"model": str(lab.models.generator), "data": data}
    ways = ["g4seg", "blur", "g4seg+blur", "best", "grounding", "word", "colour-affinity"]
    assert compare.compare(",".join(ways), **options) == 0
    table = read_table(tmp_path / "out" / "compare.json")
    assert table.protocol["split"] == "train"
    assert [row["way"] for row in table.rows] == ["seed", *ways]
    known = compare.read_ways(compare.WAYS)
    assert {part for way in compare.SIDE_BY_SIDE.split(",") for part in way.split("+")} <= {*known}


def test_compare_as_its_help_says(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_voc(tmp_path)
    table_of, used = compare.table_of, []

    def watched(name: str, source: Any, ways: Any, runner: Runner, *others: Any) -> Table:
        used.append(describe(runner.features))
        return table_of(name, source, ways, runner, *others)

    monkeypatch.setattr(compare, "table_of", watched)
    words = ["compare", "--ways", "blur", "--data", "datamodules.VOCDataModule"]
    words += ["--data.root", str(tmp_path), "--data.seeds", str(tmp_path / "cam_out")]
    words += ["--data.num_workers", "0", "--model", str(lab.models.generator), "--resamples", "9"]
    words += ["--noise_seeds", "1", "--store", str(tmp_path / "s"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    # Matched where predict matches, and not in what was chosen in the embedded world.
    chosen = json.loads(CHOSEN.read_text(encoding="utf-8"))["features"]
    assert used == [describe(VAEFeatures())]
    assert chosen["init_args"] != used[0]["init_args"]
    with pytest.raises(ConfigurationError, match="give it with data"):
        compare.compare("blur", background=Threshold(0.9), **places(lab, tmp_path))


def test_compare_notices_changed_seeds(lab: Lab, tmp_path: Path) -> None:
    write_voc(tmp_path)
    seeds = tmp_path / "cam_out"
    options = places(lab, tmp_path) | {"model": str(lab.models.generator)}

    def seed_score() -> float:
        data = VOCDataModule(tmp_path, seeds, num_workers=0)
        assert compare.compare("blur", data=data, **options) == 0
        return float(read_table(tmp_path / "out" / "compare.json").rows[0]["mIoU"])

    before = seed_score()
    assert seed_score() == before
    for path in seeds.iterdir():
        content = np.load(path, allow_pickle=True).item()
        content["attn_highres"] = np.roll(content["attn_highres"], 9, axis=2)
        np.save(path, content, allow_pickle=True)
    assert seed_score() < before
    next(seeds.iterdir()).unlink()
    data = VOCDataModule(tmp_path, seeds, num_workers=0)
    assert compare.compare("blur", data=data, **options) == 1


@pytest.mark.parametrize("name", PAPER)
def test_every_table_of_the_paper_runs_in_the_world(name: str, lab: Lab, tmp_path: Path) -> None:
    options = places(lab, tmp_path) | {"noise_seeds": 1, "images": 4, "quiet": True}
    model = paper.Model(str(lab.models.generator))
    assert paper.paper(name, world=True, model=model, **options) == 0
    table = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert "embedded world" in table["notes"][0]
    assert any(row.get("(P)") is not None for row in table["rows"])
    assert any(row.get("gain") is not None for row in table["rows"])
    # What no validation scene chose is said: all of table 3, and every open-vocabulary way.
    told = table["protocol"]["settings"]
    assert (told == "configs/paper/ways.yaml") == (name in ("table-3", "table-4", "fig-4"))
    assert name != "table-1" or "g4seg-open-vocabulary: configs" in told


def test_a_table_of_the_paper_runs_on_data(lab: Lab, tmp_path: Path) -> None:
    write_voc(tmp_path)
    words = ["table-3", "--data.root", str(tmp_path), "--data.seeds", str(tmp_path / "cam_out")]
    words += ["--model.model", str(lab.models.generator), "--out", str(tmp_path / "out")]
    words += ["--store", str(tmp_path / "store"), "--noise_seeds", "1", "--resamples", "20"]
    assert paper.main(words) == 0
    table = json.loads((tmp_path / "out" / "table-3.json").read_text())
    assert table["notes"][0] == ON_DATA
    assert {row["way"]: row["(P)"] for row in table["rows"]}["EMI-SCA"] == 71.7
    assert {(row["images"], row["split"]) for row in table["rows"]} == {(3, "train")}
    assert table["protocol"]["settings"] == "configs/paper/ways.yaml"
    next((tmp_path / "cam_out").iterdir()).unlink()
    assert paper.main(words) == 1
    table = json.loads((tmp_path / "out" / "table-3.json").read_text())
    assert {(row["images"], row["left out"]) for row in table["rows"]} == {(2, 1)}
    with pytest.raises(ConfigurationError, match=r"model\.model: None given"):
        paper.main([word for word in words if "model" not in word and "generator" not in word])


def test_groups_of_masks_say_how_many_images_they_are_of(lab: Lab, tmp_path: Path) -> None:
    write_voc(tmp_path)
    words = ["table-7", "--rows", "CLIP-ES", "--data.root", str(tmp_path), "--data.seeds"]
    words += [str(tmp_path / "cam_out"), "--model.model", str(lab.models.generator)]
    words += ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    words += ["--noise_seeds", "1", "--resamples", "20"]
    next((tmp_path / "cam_out").iterdir()).unlink()
    assert paper.main(words) == 1
    rows = json.loads((tmp_path / "out" / "table-7.json").read_text())["rows"]
    assert {row["group"] for row in rows} == {f"seed IoU {s}" for s in ("0-40", "40-80", "80-100")}
    told = {(row["seeds"], row["split"], row["images"], row["left out"]) for row in rows}
    assert told == {("clip_es", "train", 2, 1)}


def test_what_decides_results_is_in_their_key(tmp_path: Path) -> None:
    write_voc(tmp_path)
    classes = tmp_path / "classes.txt"
    lines = [f"class{n} | word {n}" for n in range(1, 21)]
    classes.write_text("\n".join(lines))

    def key(**options: Any) -> Any:
        module = VOCDataModule(tmp_path, tmp_path / "cam_out", class_names=classes, **options)
        return DataSource(module, "files").describe()

    before = key(num_workers=0)
    assert key(num_workers=1, batch_size=7) == before
    classes.write_text("\n".join([*lines[:-1], "class20 | another word"]))
    assert key(num_workers=0) != before


def test_rows_of_several_makers_do_not_share_a_folder(lab: Lab, tmp_path: Path) -> None:
    write_voc(tmp_path)
    data = paper.Data(tmp_path, tmp_path / "cam_out")
    model = paper.Model(str(lab.models.generator))
    options = places(lab, tmp_path) | {"data": data, "noise_seeds": 1, "model": model}
    with pytest.raises(ConfigurationError, match="groupvit_voc, sclip_voc, diffsegmenter_voc"):
        paper.paper("table-1", rows="VOC", **options)
    with pytest.raises(ConfigurationError, match=r"none of table-3 holds 'IRN'.*'CLIP-ES'"):
        paper.paper("table-3", rows="IRN", **options)


def test_the_paper_command_needs_a_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--world"):
        paper.paper("table-1")
    with pytest.raises(ConfigurationError, match="table-11"):
        paper.paper("table-10", world=True)
