"""A twelve-scene slice of every table of the laboratory."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.evidence import ClassEvidence
from g4seg_pl.evaluation.confusion import overlaps_of
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.features.open_clip import OpenClipFeatures
from g4seg_pl.lab import __main__ as command
from g4seg_pl.lab.cache import Store
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.pictures import failures
from g4seg_pl.lab.scores import Scores
from g4seg_pl.lab.stages import Batch, Masks, Way
from g4seg_pl.lab.table import Table, read_table
from g4seg_pl.lab.tables import refinement
from g4seg_pl.lab.tables.decoders import decoders
from g4seg_pl.lab.tables.explanation import Measurement, claim, kept_by_batch
from g4seg_pl.lab.tables.groups import clustered_mean, per_mask
from g4seg_pl.lab.tables.judging import Judged, likelihood, right
from g4seg_pl.lab.tables.words import prompts_and_injections

PLAIN = ["modules", "sensitivity", "groups", "refiners", "signals", "controls", "costs", "words"]


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


def test_affinity_is_told_what_it_is_not_told_already() -> None:
    for prompt, other in (("empty", "classes"), ("classes", "empty")):
        way = Way("affinity", (Affinity(prompt=prompt),))
        found = {each.name: each.stages for each in prompts_and_injections(way)}
        names = {"empty": "affinity, empty prompt", "classes": "affinity, classes in the prompt"}
        assert found["affinity, right class"] == way.stages
        assert found[names[other]] == (Affinity(prompt=other),)
        assert names[prompt] not in found


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


def test_losses_are_filed_under_all_that_their_models_are(lab: Lab, tmp_path: Path) -> None:
    clip = shutil.copytree(lab.models.clip, tmp_path / "clip")
    store = Store(tmp_path / "store")

    def measured(features: DenseFeatures | None = None, **models: Any) -> bool:
        """Whether losses are measured, or taken from those kept."""
        other = replace(lab, models=replace(lab.models, **models), store=store, images=1)
        other.features = features or lab.features
        calls: list[Batch] = []

        def measure(batch: Batch, _: Masks) -> dict[str, Any]:
            calls.append(batch)
            return {}

        list(kept_by_batch(other, "degraded", "explained", {}, measure))
        return bool(calls)

    assert measured()
    assert not measured()
    assert measured(prompt_template="A drawing of {}")
    looks = OpenClipFeatures(str(clip), image_size=64)
    assert measured(looks)
    assert not measured(looks)
    (clip / "other_weights").write_text("")
    assert measured(looks)


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
    # Masks of one image have no error: nothing is known of other images.
    gain, unknown = clustered_mean(np.array([1.0, 4.0]), np.array([1, 1]), 3, 50)
    assert (gain, unknown) == (2.5, None)
    table = Table("groups", "", ({"gain": gain, "gain_se": unknown},), {})
    assert "| +2.50 |" in table.markdown()


def test_command_line_reports(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["modules", "report", "--images", "12", "--noise-seeds", "2", "--quiet"]
    words += ["--generator", str(lab.models.generator), "--clip", str(lab.models.clip)]
    words += ["--store", str(lab.store.root), "--results", str(lab.results)]
    assert command.main([*words, "--kinds", "degraded", "--resamples", "20"]) == 0
    assert "EMI + SCA" in capsys.readouterr().out
    assert "Modules of the paper" in lab.results.with_suffix(".md").read_text()
    assert command.main([*words, "--results", "nowhere"]) == 1
    assert "choose" in capsys.readouterr().err
