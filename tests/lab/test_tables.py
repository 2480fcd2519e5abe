"""A twelve-scene slice of every table of the laboratory, of `compare` and of the paper."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, AutoencoderTiny
from fake_voc import write_voc

from datamodules import VOCDataModule
from g4seg_pl.callbacks.run_record import describe
from g4seg_pl.core.background import Threshold
from g4seg_pl.core.evidence import ClassEvidence
from g4seg_pl.evaluation.confusion import overlaps_of
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab import __main__ as command
from g4seg_pl.lab import compare, paper
from g4seg_pl.lab.laboratory import CHOSEN, Lab
from g4seg_pl.lab.paper_table import ON_DATA
from g4seg_pl.lab.pictures import failures
from g4seg_pl.lab.runner import Runner
from g4seg_pl.lab.scores import Scores
from g4seg_pl.lab.sources import DataSource
from g4seg_pl.lab.table import Table, read_table
from g4seg_pl.lab.tables import refinement
from g4seg_pl.lab.tables.decoders import decoders
from g4seg_pl.lab.tables.explanation import Measurement, claim
from g4seg_pl.lab.tables.groups import clustered_mean, per_mask
from g4seg_pl.lab.tables.judging import Judged, likelihood, right
from g4seg_pl.main import main
from g4seg_pl.types import ConfigurationError

PLAIN = ["modules", "sensitivity", "groups", "refiners", "signals", "controls", "costs", "words"]
PLANS = {path.stem: yaml.safe_load(path.read_text()) for path in paper.CONFIGS.glob("*-*.yaml")}
PAPER = sorted(name for name, plan in PLANS.items() if "columns" not in plan)


def check(table: Table, folder: Path) -> None:
    table.write(folder)
    again = read_table(folder / f"{table.name}.json")
    assert again.markdown() == table.markdown()
    assert table.rows
    for row in table.rows:
        assert all(not isinstance(value, float) or np.isfinite(value) for value in row.values())


@pytest.mark.parametrize("name", PLAIN)
def test_table_runs_and_resumes(
    name: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for group in ("AXES", "READINGS"):
        axes = {axis: values[1:2] for axis, values in getattr(refinement, group).items()}
        monkeypatch.setattr(refinement, group, axes)
    table = command.TABLES[name](lab)
    check(table, tmp_path)
    if name == "costs":
        return
    before = lab.runner().computed
    assert command.TABLES[name](lab).rows == table.rows
    assert lab.runner().computed == before
    ways = {str(row.get("way")) for row in table.rows}
    if name == "words":
        others = [str(row["way"]) for row in table.rows if row["generator"] != "embedded"]
        assert {way.partition(",")[2] for way in others} == {" right class", " wrong class"}
        assert not any(way.startswith("gradient") for way in others)
    else:
        assert any("feature-nn" in way or "self" in way for way in ways), "no control"


def test_feature_spaces_have_further_noise_seeds_on_the_first_kind_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refinement, "AXES", {})
    monkeypatch.setattr(refinement, "READINGS", {})
    space = {"class_path": "g4seg_pl.features.vae.VAEFeatures", "init_args": {"level": 0}}
    two = replace(lab, kinds=("degraded", "cross_attention"), noise_seeds=(0, 1))
    two.__dict__["chosen"] = lab.chosen | {"features": space | {"tried": [{"features": space}]}}
    drawn: dict[str, int] = {}
    lines = Lab.lines

    def counted(self: Lab, kind: Any, ways: Any, features: Any = None) -> Any:
        drawn.update({f"{kind}, {way.name}": len(self.noise_seeds) for way in ways})
        return lines(self, kind, ways, features)

    monkeypatch.setattr(Lab, "lines", counted)
    rows = refinement.sensitivity(two).rows
    for kind, seeds in (("degraded", 2), ("cross_attention", 1)):
        ways = [str(row["way"]) for row in rows if row["seeds"] == kind]
        (name,) = [way for way in ways if way.startswith("features")]
        assert drawn[f"{kind}, {name}"] == seeds
        assert drawn[f"{kind}, g4seg"] == 2
        assert ways.count("seed") == 1


def test_open_vocabulary_table(lab: Lab, tmp_path: Path) -> None:
    check(command.TABLES["open_vocabulary"](lab), tmp_path)


def test_a_tiny_decoder_is_paired_with_the_full_one(
    lab: Lab, tiny_decoder_folder: Path, tmp_path: Path
) -> None:
    table = decoders(lab, tiny_decoder_folder)
    check(table, tmp_path)
    full, tiny = table.rows
    assert (full["decoder"], tiny["decoder"]) == ("full", "tiny")
    assert full["seeds"] == tiny["seeds"] == "degraded"
    assert tiny["over full"] == pytest.approx(tiny["mIoU"] - full["mIoU"], abs=1e-9)
    source = lab.source("degraded")
    images = torch.stack([sample.image for sample in source.samples(source.ids)]) / 127.5 - 1
    model = str(lab.models.generator)
    with torch.no_grad():
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae").eval()
        latents = vae.encode(images).latent_dist.mode()
        by_tiny = AutoencoderTiny.from_pretrained(tiny_decoder_folder).decode(
            latents * vae.config.scaling_factor
        )
        pictures = {"full": vae.decode(latents).sample, "tiny": by_tiny.sample}
    for row in table.rows:
        error = ((pictures[str(row["decoder"])].clamp(-1, 1) - images) / 2).square()
        expected = -10 * error.mean((1, 2, 3)).log10().mean()
        assert row["PSNR of x₀"] == pytest.approx(float(expected), abs=1e-3)
    same = replace(lab, models=replace(lab.models, decoder=tiny_decoder_folder))
    before, after = (each.models.identity(None) for each in (lab, same))
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"decoder"}
    on_gpu = replace(lab.models, device="cuda").identity(None)
    assert on_gpu == before | {"dtype": "torch.bfloat16"}, "or both would share results"


def test_claim_and_likelihood(lab: Lab, tmp_path: Path) -> None:
    how = Measurement(timesteps=(400,), draws=1)
    table = claim(lab, how)
    check(table, tmp_path)
    others = [row["truth against"] for row in table.rows]
    assert others[0] == "seed (degraded)"
    assert {"empty", "shuffled"} < set(others)
    assert all(0 <= row["share %"] <= 100 for row in table.rows)
    assert claim(lab, how).rows == table.rows
    both = claim(replace(lab, kinds=("degraded", "cross_attention")), how)
    assert both.rows[:-1] == table.rows
    assert both.rows[-1]["truth against"] == "seed (cross_attention)"
    # The truth measured beside one kind of seeds serves the others.
    alone = claim(replace(lab, kinds=("cross_attention",)), how)
    assert both.rows[-1] == alone.rows[0]
    evidence = ClassEvidence((400,), draws=1)
    chosen = likelihood(lab, how, evidence)
    check(chosen, tmp_path)
    rows = {str(row["what"]): row for row in chosen.rows}
    gains = {what: row["value"] for what, row in rows.items() if what.startswith("mean IoU gain:")}
    oracle = gains.pop("mean IoU gain: chosen by truth (oracle)")
    assert oracle >= max(gains.values())
    picked = rows["mean IoU gain of the mask chosen"]
    judges = {"loss", "evidence", "evidence + word", "area", "colour cut", "best's mask"}
    assert judges < set(picked)
    assert all(picked[name] <= oracle for name in judges)
    for name in judges:
        assert 0 <= rows["right, truth against seed"][name] <= 100
    assert rows["right, truth against seed"]["validation order"] is None
    assert rows["rank correlation with area"]["area"] == pytest.approx(1.0)
    assert likelihood(lab, how, evidence).rows == chosen.rows


def test_a_judge_is_right_where_it_says_so() -> None:
    # Three candidates of two masks; the second pair of IoUs is equal and does not count.
    ious = np.array([[0.2, 0.5], [0.6, 0.5], [0.9, 0.1]])
    scores = {
        "perfect": ious,
        "reversed": -ious,
        "blind": np.zeros((3, 2)),
        "silent": np.array([[0.0, 0.0], [1.0, 1.0], [np.nan, np.nan]]),
    }
    found = Judged(("a", "b", "c"), 3, scores, ious, ious, np.array([0, 0]))
    pairs = [(0, 1), (0, 2), (1, 2)]
    picked, gaps = right(found, "perfect", pairs)
    assert picked.tolist() == [1.0] * 5
    np.testing.assert_allclose(gaps, [0.4, 0.7, 0.4, 0.3, 0.4])
    assert right(found, "reversed", pairs)[0].tolist() == [0.0] * 5
    assert right(found, "blind", pairs)[0].tolist() == [0.5] * 5
    silent = right(found, "silent", pairs)[0]
    assert silent[0] == 1.0
    assert np.isnan(silent[1:]).all()


def test_failures_are_drawn(lab: Lab, tmp_path: Path) -> None:
    assert failures(lab, tmp_path, count=2).is_file()


def test_masks_are_taken_apart_from_overlaps() -> None:
    # Class 1: 10 pixels, 6 found, 2 of the background taken too.
    before = np.array([[[88, 2], [4, 6]]])
    after = np.array([[[89, 1], [1, 9]]])
    empty = np.zeros((1, 0, 3, 2), int)
    bands, ones = np.zeros((1, 2, 2), int), np.ones(1, int)

    def scores(counts: Any) -> Scores:
        return Scores(("a",), overlaps_of(counts), bands, empty, empty, ones, ones.astype(float))

    found = per_mask(scores(before), scores(after))
    assert found.before.tolist() == [0.5]
    assert found.after.tolist() == [9 / 11]
    assert found.size.tolist() == [0.1]
    assert found.excess.tolist() == pytest.approx([-0.2])
    mean, error = clustered_mean(np.array([1.0, 1.0, 1.0]), np.array([0, 0, 1]), 3, 50)
    assert (mean, error) == (1.0, 0.0)


def test_command_line_reports(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["modules", "report", "--images", "12", "--noise-seeds", "2", "--quiet"]
    words += ["--generator", str(lab.models.generator), "--clip", str(lab.models.clip)]
    words += ["--store", str(lab.store.root), "--results", str(lab.results)]
    assert command.main([*words, "--kinds", "degraded", "--resamples", "20"]) == 0
    assert "EMI + SCA" in capsys.readouterr().out
    assert "Modules of the paper" in lab.results.with_suffix(".md").read_text()
    assert command.main([*words, "--results", "nowhere"]) == 1
    assert "choose" in capsys.readouterr().err


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
