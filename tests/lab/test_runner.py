"""Book-keeping: nothing twice, keys that change with settings, common parts shared, pairs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_stable_diffusion

from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.background import PowerBackground, Threshold, compose_label
from g4seg_pl.core.confidence import Averaged
from g4seg_pl.core.likelihood import ChooseByLikelihood
from g4seg_pl.core.null_text import NullTextCorrespondence
from g4seg_pl.core.steps import Blur, Correspondence
from g4seg_pl.evaluation.bootstrap import paired_overlaps
from g4seg_pl.evaluation.boundary import trimap
from g4seg_pl.evaluation.confusion import confusion_matrix, mean_overlap, overlaps_of
from g4seg_pl.features.open_clip import OpenClipFeatures
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab import cache
from g4seg_pl.lab.cache import Store, hash_of_files, key_of
from g4seg_pl.lab.controls import WithFeatures
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.runner import Runner
from g4seg_pl.lab.scores import THRESHOLDS, TRIMAP_WIDTHS, Scores, gain_of, line, score_image
from g4seg_pl.lab.sources import BANDS, SceneSource, mask_iou
from g4seg_pl.lab.stages import CascadePSP, DenseCRF, LabelFiles, Masks, Way, at_threshold
from g4seg_pl.lab.written import build_object
from g4seg_pl.types import ConfigurationError

RULE = Threshold(0.5)
WAYS = [
    Way("blur", (Blur(1.0),)),
    Way("g4seg", (Correspondence(confidence_range=None),)),
    Way("both", (Blur(1.0), Correspondence(confidence_range=None))),
]


def scenes(runner: Runner, count: int = 4, **options: object) -> SceneSource:
    return SceneSource(runner.models, runner.store, "degraded", "val", count, **options)


def test_inversion_draws_no_noise_though_it_meets_a_pass_again(runner: Runner) -> None:
    step = NullTextCorrespondence(ddim_steps=2, inner_steps=1, confidence_range=None)
    found = runner.run([Way("nti", (step,))], scenes(runner), RULE, (0, 1))["nti"]
    assert runner.computed == 4
    np.testing.assert_array_equal(found[0].overlaps, found[1].overlaps)


def test_resume_computes_nothing_twice(runner: Runner) -> None:
    first = runner.run(WAYS, scenes(runner), RULE, (0, 1))
    # Three ways, four scenes, two seeds; blur draws no noise and runs once.
    assert runner.computed == 4 * (1 + 2 + 2)
    again = runner.run(WAYS, scenes(runner), RULE, (0, 1))
    assert runner.computed == 20
    fresh = Runner(runner.models, runner.store)
    loaded = fresh.run(WAYS, scenes(fresh), RULE, (0, 1))
    assert fresh.computed == 0
    for name, runs in first.items():
        for one, two, three in zip(runs, again[name], loaded[name], strict=True):
            np.testing.assert_array_equal(one.overlaps, two.overlaps)
            np.testing.assert_array_equal(one.overlaps, three.overlaps)


def test_equal_ways_are_made_and_kept_once(runner: Runner) -> None:
    step = Correspondence(confidence_range=None)
    ways = [Way(name, (step,)) for name in ("chosen", "one of a sweep")]
    found = runner.run(ways, scenes(runner), RULE)
    assert runner.computed == 4
    assert [found[way.name][0].ids for way in ways] == [scenes(runner).ids] * 2
    (kept,) = [json.loads(p.read_text()) for p in (runner.store.root / "runs").glob("*.json")]
    assert kept["summary"]["n_images"] == 4


def test_another_extractor_looks_within_other_steps_too(runner: Runner) -> None:
    deep = WithFeatures([Correspondence(confidence_range=None)], VAEFeatures(level=0))
    ways = [Way("within", (Averaged([deep], draws=1),)), Way("deep", (deep,))]
    found = {
        name: runs[0].overlaps for name, runs in runner.run(ways, scenes(runner), RULE).items()
    }
    np.testing.assert_array_equal(found["within"], found["deep"])


def test_a_source_without_a_readable_image_is_named(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SceneSource, "samples", lambda *_: [])
    with pytest.raises(ConfigurationError, match="no image of degraded could be read"):
        runner.run(WAYS, scenes(runner), RULE)


def test_results_of_other_code_are_told_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        Store(tmp_path).save("runs", number, {"found": np.array(number)})
    assert Store(tmp_path).load("runs", 0) == {"found": 0}
    assert not capsys.readouterr().err
    monkeypatch.setattr(cache, "code_identity", lambda: "other")
    later = Store(tmp_path)
    for number in range(2):
        assert later.load("runs", number) == {"found": number}
    (line,) = capsys.readouterr().err.splitlines()
    assert "another version of the code" in line


def test_comments_and_docstrings_are_no_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "core").mkdir()
    monkeypatch.setattr(cache, "_PACKAGE", tmp_path)
    monkeypatch.setattr(cache, "_DETERMINING", ("core",))

    def identity(text: str) -> str:
        (tmp_path / "core" / "a.py").write_text(text)
        return cache.code_identity.__wrapped__()

    plain = identity("def f(x):\n    return x + 1\n")
    assert identity('"""A."""\ndef f(x):\n    """B."""\n    return x + 1  # c\n') == plain
    assert identity("def f(x):\n    return x - 1\n") != plain


def test_files_behind_links_count(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights").write_text("old")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vae").symlink_to(tmp_path / "vae")
    before = hash_of_files(tmp_path / "model")
    (tmp_path / "vae" / "weights").write_text("new")
    assert hash_of_files(tmp_path / "model") != before


def test_more_scenes_compute_only_the_new_batch(runner: Runner) -> None:
    small = runner.run(WAYS[:1], scenes(runner, 16), RULE)["blur"][0]
    before = runner.computed
    large = runner.run(WAYS[:1], scenes(runner, 20), RULE)["blur"][0]
    assert runner.computed - before == 4
    np.testing.assert_array_equal(large.overlaps[:16], small.overlaps)
    fewer = runner.run(WAYS[:1], scenes(runner, 3), RULE)["blur"][0]
    assert fewer.ids == small.ids[:3]


def test_any_setting_or_weight_changes_the_key(runner: Runner, tmp_path: Path) -> None:
    source, way = scenes(runner), WAYS[1]
    plain = key_of(runner.description(way, source, RULE, 0))
    step = replace(way.stages[0], timestep=399)
    others = [
        runner.description(replace(way, stages=(step,)), source, RULE, 0),
        runner.description(replace(way, background=0.4), source, RULE, 0),
        runner.description(way, source, Threshold(0.4), 0),
        runner.description(way, source, RULE, 1),
        runner.description(way, scenes(runner, max_objects=1), RULE, 0),
        runner.description(way, SceneSource(runner.models, runner.store, "clip_es"), RULE, 0),
    ]
    clip = shutil.copytree(runner.models.clip, tmp_path / "clip")
    looks = replace(way, stages=(WithFeatures([step], OpenClipFeatures(str(clip))),))
    others.append(runner.description(looks, source, RULE, 0))
    (clip / "open_clip_config.json").write_text("{}")
    others.append(runner.description(looks, source, RULE, 0))
    weights = tmp_path / "cascade" / "model"
    weights.parent.mkdir()
    cascade = replace(way, stages=(CascadePSP(str(weights.parent)),))
    for content in ("old", "new"):
        weights.write_text(content)
        others.append(runner.description(cascade, source, RULE, 0))
    other = Models(write_stable_diffusion(tmp_path / "other", version=2), runner.models.clip)
    others.append(Runner(other, runner.store).description(way, source, RULE, 0))
    keys = {plain, *(key_of(each) for each in others)}
    assert len(keys) == 1 + len(others)
    assert key_of(runner.description(replace(way, name="renamed"), source, RULE, 0)) == plain


def test_a_chain_equals_its_stages_run_by_the_refiner(runner: Runner) -> None:
    source = scenes(runner, 3)
    found = runner.run(WAYS, source, RULE, (5,))["both"][0]
    refiner = runner.models.refiner().with_steps(WAYS[2].stages)
    refiner.seed = 5
    samples = source.samples(source.ids)
    with torch.no_grad():
        refined = refiner.refine_samples(samples)
    for index, (sample, soft) in enumerate(zip(samples, refined, strict=True)):
        label = compose_label(soft, sample.seed.class_ids, RULE).numpy()
        wanted = confusion_matrix(label, sample.truth.numpy(), source.num_classes)
        np.testing.assert_array_equal(found.overlaps[index], overlaps_of(wanted))


def test_runs_begin_where_kept_ones_ended(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blurred, chained = WAYS[0], WAYS[2]
    other = Way("other", (Blur(1.0), Correspondence(confidence_range=None, beta=0.5)))
    fresh = Runner(runner.models, Store(tmp_path / "fresh"))
    wanted = fresh.run([chained, other], scenes(fresh), RULE, (0, 1))
    done: list[str] = []

    def noted(kind: type[Blur] | type[Correspondence], method: str) -> None:
        plain = getattr(kind, method)

        def call(*args: object) -> object:
            done.append(kind.__name__)
            return plain(*args)

        monkeypatch.setattr(kind, method, call)

    noted(Blur, "__call__")
    noted(Correspondence, "generate")
    with runner.keeping():
        runner.run([blurred], scenes(runner), RULE, (0, 1))
        first = runner.run([chained], scenes(runner), RULE, (0, 1))
        generated = done.count("Correspondence")
        second = runner.run([other], scenes(runner), RULE, (0, 1))
        # Once a noise seed: what is blurred already is blurred no more, nor generated again.
        assert done.count("Blur") == 2
        assert done.count("Correspondence") == generated > 0
    for name, runs in (first | second).items():
        for one, two in zip(runs, wanted[name], strict=True):
            np.testing.assert_array_equal(one.overlaps, two.overlaps)
            assert one.noisy
    runner.run([Way("again", (Blur(1.0), Blur(2.0)))], scenes(runner), RULE)
    assert done.count("Blur") == 4


def test_scores_saved_as_whole_matrices_are_read_as_overlaps() -> None:
    numbers = np.random.default_rng(0)
    label, truth = numbers.integers(0, 5, (2, 40, 30)).astype(np.uint8)
    scores = score_image("a", label, truth, 5, (numbers.random((2, 40, 30), np.float32), (1, 4)))
    saved = dict(scores.arrays())
    assert Scores.from_arrays(saved).curve.tolist() == scores.curve.tolist()
    del saved["overlaps"]
    near = [confusion_matrix(label, trimap(truth, width), 5) for width in TRIMAP_WIDTHS]
    levels = [confusion_matrix(label, truth, 5)] * len(THRESHOLDS)
    older = saved | {
        "counts": confusion_matrix(label, truth, 5)[None].astype(np.int32),
        "trimaps": np.stack(near)[None].astype(np.int32),
        "curve": np.stack(levels)[None].astype(np.int32),
    }
    found = Scores.from_arrays(older)
    for name in ("ids", "overlaps", "bands", "trimaps", "masks", "seconds"):
        np.testing.assert_array_equal(getattr(found, name), getattr(scores, name))
    assert found.curve.shape == scores.curve.shape


def test_gains_are_paired_and_noise_seeds_no_further_images(runner: Runner) -> None:
    found = runner.run([Way("seed"), *WAYS], scenes(runner), RULE, (0, 1))
    before, after = found["seed"], found["g4seg"]
    summed = np.sum([run.overlaps for run in after], axis=0)
    wanted = paired_overlaps(before[0].overlaps * 2, summed, 50)
    assert gain_of(before, after, 50) == wanted
    row = line("g4seg", before, after, 50)
    assert row.gain == pytest.approx(100 * wanted.value)
    assert row.miou == pytest.approx(100 * mean_overlap(summed))
    assert line("seed", before, before, 50).gain_se == 0
    with pytest.raises(ValueError, match="same images"):
        gain_of([before[0].select(before[0].ids[:2])], after, 10)


def test_one_noise_seed_has_no_spread(runner: Runner) -> None:
    for _ in range(2):  # made, and read again
        found = runner.run([Way("seed"), *WAYS], scenes(runner), RULE, (0,))
        spread = {
            name: line(name, found["seed"], runs, 20).seed_spread for name, runs in found.items()
        }
        assert spread == {"seed": 0.0, "blur": 0.0, "g4seg": None, "both": None}
    two = runner.run(WAYS[:2], scenes(runner), RULE, (0, 1))
    alone = [100 * mean_overlap(run.overlaps) for run in two["g4seg"]]
    found_spread = line("g4seg", two["blur"], two["g4seg"], 20).seed_spread
    assert found_spread == pytest.approx(abs(alone[0] - alone[1]) / 2**0.5)
    assert line("blur", two["blur"], two["blur"], 20).seed_spread == 0.0


def test_crf_and_files_decide_their_own_labels(runner: Runner, tmp_path: Path) -> None:
    pytest.importorskip("pydensecrf")
    from PIL import Image

    source = scenes(runner, 3)
    for sample in source.samples(source.ids):
        Image.fromarray(sample.truth.numpy()).save(tmp_path / f"{sample.image_id}.png")
    ways = [
        Way("dcrf", (DenseCRF(scale=0.13),)),
        Way("chain", (DenseCRF(scale=0.13), Blur(0.5)), 0.3),
        Way("files", (Blur(), LabelFiles(str(tmp_path)))),
    ]
    found = runner.run([Way("seed"), *ways], source, RULE)
    assert mean_overlap(found["files"][0].overlaps) == 1
    assert (found["dcrf"][0].overlaps != found["seed"][0].overlaps).any()
    with pytest.raises(ConfigurationError, match="label file"):
        runner.run([Way("none", (LabelFiles(str(tmp_path / "no")),))], source, RULE)
    for path in tmp_path.glob("*.png"):
        Image.fromarray(np.zeros_like(Image.open(path))).save(path)
    assert mean_overlap(runner.run(ways[2:], source, RULE)["files"][0].overlaps) < 1, (
        "read from the store"
    )


@pytest.mark.parametrize("kind", BANDS)
def test_bands_hold_what_they_say(kind: str, runner: Runner) -> None:
    source = SceneSource(runner.models, runner.store, kind, "val", 12)
    samples = source.samples(source.ids)
    low, high = BANDS[kind]
    ious = [
        mask_iou(soft.numpy() > 0.5, (sample.truth == label).numpy())
        for sample in samples
        for label, soft in zip(sample.seed.class_ids, sample.seed.scores, strict=True)
    ]
    # Half precision may move a pixel that lies at 0.5 exactly.
    inside = [low - 0.05 <= iou <= high + 0.05 for iou in ious]
    assert np.mean(inside) >= 0.75
    again = SceneSource(runner.models, Store(runner.store.root / "x"), kind, "val", 12)
    for one, two in zip(samples, again.samples(source.ids), strict=True):
        assert torch.equal(one.seed.scores, two.seed.scores)


@pytest.mark.parametrize("kind", ["gradcam", "clip_es", "cross_attention"])
def test_model_seeds_are_made_once(kind: str, lab: Lab, tmp_path: Path) -> None:
    source = SceneSource(lab.models, Store(tmp_path), kind, "val", 2)
    made = source.samples(source.ids)
    kept = SceneSource(lab.models, Store(tmp_path), kind, "val", 2)
    read = kept.samples(kept.ids)
    assert kept._maker is None
    for one, two in zip(made, read, strict=True):
        assert torch.equal(one.seed.scores, two.seed.scores)
        assert one.seed.scores.max() <= 1


def test_steps_are_told_the_threshold() -> None:
    step = ChooseByLikelihood([[Affinity(), Correspondence(binarise_at=None)]])
    told = at_threshold(step, 0.3)
    assert told.binarise_at == 0.3
    assert told.candidates[0][0].threshold == 0.3
    assert told.candidates[0][1].binarise_at is None
    assert Masks((), PowerBackground(1.0)).threshold == pytest.approx(0.5)
    assert Masks((), PowerBackground(2.0)).threshold == pytest.approx((3 - 5**0.5) / 2)


@pytest.mark.parametrize(
    "written",
    [
        {"class_path": "g4seg_pl.core.steps.Nothing"},
        {"class_path": "g4seg_pl.core.steps.Blur", "init_args": {"sigma": -1}},
        {"class_path": "g4seg_pl.core.steps.Blur", "init_args": {"width": 1}},
        {"class_path": "Blur"},
        {},
    ],
)
def test_a_stage_that_cannot_be_made_is_named(written: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="cannot be made"):
        build_object(written)
