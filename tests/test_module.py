"""The module in a Trainer: mixed batches, gradients, scores, checkpoints."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fake_voc import IDS, write_voc
from PIL import Image

from datamodules import VOCDataModule
from datamodules.seed_files.maps import ReadOptions
from g4seg_pl.callbacks.output_folder import OutputFolder
from g4seg_pl.callbacks.processes import ProcessFiles
from g4seg_pl.callbacks.records import read_records
from g4seg_pl.callbacks.writer import MaskWriter
from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.background import PowerBackground, Threshold
from g4seg_pl.core.confidence import Averaged
from g4seg_pl.core.controls import FlatInjection
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.grounding import Grounding
from g4seg_pl.core.likelihood import ChooseByLikelihood
from g4seg_pl.core.null_text import NullTextCorrespondence
from g4seg_pl.core.steps import Blur, Correspondence
from g4seg_pl.core.threshold import told_threshold
from g4seg_pl.evaluation.evaluate import evaluate
from g4seg_pl.module import G4SegModule
from g4seg_pl.types import ConfigurationError, FailedSample, RefinedMask, Sample, Seed


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet CPU trainer."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(callbacks=list(callbacks), **quiet | options)


def data(root: Path, **options: Any) -> VOCDataModule:
    """The fake tree, made on first use."""
    if not (root / "VOCdevkit").exists():
        write_voc(root)
    return VOCDataModule(root, root / "cam_out", num_workers=0, **options)


class Collect(pl.Callback):
    """Keep the predictions."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Keep a batch by id."""
        self.found |= {item.image_id: item for item in outputs}


def predicted(module: G4SegModule, datamodule: VOCDataModule, **options: Any) -> dict[str, Any]:
    """All predictions by id."""
    collect = Collect()
    trainer(collect, **options).predict(module, datamodule, return_predictions=False)
    return collect.found


@dataclass(frozen=True)
class GradientStep:
    """A step that needs a gradient with respect to the mask."""

    def __call__(self, foreground: torch.Tensor, context: Any) -> torch.Tensor:
        """One step of gradient descent on the squared mask, through the latent's scale."""
        with torch.enable_grad():
            leaf = foreground.clone().requires_grad_()
            (leaf.square().sum() * context.latents.square().mean().sign()).backward()
        return (foreground - 0.1 * leaf.grad).clamp(0, 1)


def test_making_a_module_loads_nothing() -> None:
    assert not list(G4SegModule("nowhere").parameters())


def test_sizes_and_class_counts_may_differ_within_a_batch(tmp_path: Path, sd2_folder: Path) -> None:
    masks = predicted(G4SegModule(str(sd2_folder)), data(tmp_path))
    assert list(masks) == list(IDS)
    assert masks[IDS[1]].foreground.shape == (2, 64, 48)
    assert masks[IDS[1]].class_ids == (15, 12)
    assert masks[IDS[2]].label.shape == (33, 70)


def test_result_does_not_depend_on_the_batch(tmp_path: Path, sd1_folder: Path) -> None:
    module = G4SegModule(str(sd1_folder), [Correspondence(beta=0.2, confidence_range=None)])
    together = predicted(module, data(tmp_path, batch_size=3))
    alone = predicted(module, data(tmp_path, batch_size=1))
    for name in IDS:
        torch.testing.assert_close(together[name].foreground, alone[name].foreground)


def test_equal_ids_in_a_batch_keep_their_own_masks(sd1_folder: Path) -> None:
    module = G4SegModule(str(sd1_folder), [Blur(sigma=0.0)])
    module.configure_model()
    pixels = torch.zeros(3, 40, 40, dtype=torch.uint8)
    maps = [torch.full((count, 40, 40), level) for count, level in ((1, 0.2), (2, 0.7))]
    samples = [
        Sample("same", pixels, Seed(tuple(range(1, len(m) + 1)), m), ("dog", "cat")[: len(m)])
        for m in maps
    ]
    bad = FailedSample("same", "no seed")
    found = module.predict_step([samples[0], bad, samples[1]])
    assert found[1] is bad
    torch.testing.assert_close(found[0].foreground, maps[0])
    torch.testing.assert_close(found[2].foreground, maps[1])


def test_step_may_take_gradients_within_inference_mode(tmp_path: Path, sd1_folder: Path) -> None:
    module = G4SegModule(str(sd1_folder), [GradientStep()])
    masks = predicted(module, data(tmp_path))
    # Well inside the object: at its edges the change is interpolated.
    assert float(masks[IDS[0]].foreground[0, 14, 11]) == pytest.approx(0.9 * 0.8, abs=0.01)


def test_null_text_inversion_runs_in_predict(tmp_path: Path, sd1_folder: Path) -> None:
    step = NullTextCorrespondence(ddim_steps=2, inner_steps=1, beta=0.2, confidence_range=None)
    masks = predicted(G4SegModule(str(sd1_folder), [step]), data(tmp_path))
    plain = predicted(G4SegModule(str(sd1_folder), [Blur(sigma=0.0)]), data(tmp_path))
    for name in IDS:
        assert (masks[name].foreground - plain[name].foreground).abs().max() > 0.01


def test_one_bad_image_does_not_stop_the_batch(tmp_path: Path, sd1_folder: Path) -> None:
    datamodule = data(tmp_path)
    np.save(tmp_path / "cam_out" / f"{IDS[1]}.npy", np.zeros((2, 2)))
    outcomes = predicted(G4SegModule(str(sd1_folder)), datamodule)
    assert isinstance(outcomes[IDS[1]], FailedSample)
    assert isinstance(outcomes[IDS[2]], RefinedMask)


def test_steps_are_told_where_labels_are_cut(tmp_path: Path, sd1_folder: Path) -> None:
    def masks(threshold: float, step: Any) -> list[torch.Tensor]:
        module = G4SegModule(str(sd1_folder), [step], background=Threshold(threshold))
        return [each.foreground for each in predicted(module, data(tmp_path)).values()]

    told, own = masks(0.15, Affinity()), masks(0.15, Affinity(threshold=0.15))
    assert all(map(torch.equal, told, own))
    assert not all(map(torch.equal, told, masks(0.5, Affinity())))
    told, own = masks(0.15, Correspondence()), masks(0.15, Correspondence(binarise_at=0.15))
    assert all(map(torch.equal, told, own))
    for given, found in ((0.3, 0.3), (0.5, 0.15)):
        nested = told_threshold(Averaged([Affinity(threshold=given)]), 0.15)
        assert nested.steps[0].threshold == found


def test_every_step_may_be_told_whatever_it_was_told_before() -> None:
    steps = [Averaged([Averaged([Affinity(threshold=0.3)])]), Correspondence(binarise_at=None)]
    outer, soft = told_threshold(steps, 0.15, always=True)
    assert outer.steps[0].steps[0].threshold == 0.15
    assert soft.binarise_at is None


@dataclass(frozen=True)
class Posterise:
    """Somebody's own step, whose fields mean what they mean to its author."""

    steps: int = 3
    level: float = 0.5
    threshold: float = 0.5
    cut: float = field(default=0.5, metadata={"told_threshold": True})


@dataclass(frozen=True)
class OwnCorrespondence(Correspondence):
    """One of ours, with a field beside."""

    level: float = 0.5


def test_only_steps_that_ask_for_it_are_told() -> None:
    assert told_threshold(Posterise(), 0.15) == Posterise(cut=0.15)
    assert told_threshold(Posterise(cut=0.3), 0.15) == Posterise(cut=0.3)
    assert told_threshold(OwnCorrespondence(), 0.15) == OwnCorrespondence(binarise_at=0.15)


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (Affinity(), "threshold"),
        (Gradient(), "threshold"),
        (Grounding(), "threshold"),
        (FlatInjection([]), "level"),
        (Correspondence(), "binarise_at"),
        (NullTextCorrespondence(), "binarise_at"),
        (ChooseByLikelihood([[Blur()]]), "binarise_at"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_step_of_ours_is_told(step: Any, name: str) -> None:
    assert told_threshold(step, 0.15) == replace(step, **{name: 0.15})


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.bfloat16), ("cpu", torch.float32)])
def test_the_number_format_is_that_of_the_device_it_will_run_on(
    sd1_folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype
) -> None:
    # Lightning moves a module to its device after it has had it load its weights.
    module = G4SegModule(str(sd1_folder))
    running = SimpleNamespace(
        predicting=True,
        limit_predict_batches=1.0,
        strategy=SimpleNamespace(root_device=torch.device(device)),
    )
    module._trainer = running  # type: ignore[assignment]
    asked: list[torch.dtype] = []

    def load(model: str, number_format: torch.dtype, *_: Any) -> Any:
        asked.append(number_format)
        raise ConfigurationError(model)

    monkeypatch.setattr("g4seg_pl.module.load_generator", load)
    with pytest.raises(ConfigurationError):
        module.configure_model()
    assert asked == [dtype]


def test_the_refiner_gets_what_the_module_was_given(sd1_folder: Path) -> None:
    given = {"seed": 7, "prompt_template": "{} there", "masks_per_pass": 3, "working_size": 48}
    module = G4SegModule(str(sd1_folder), [Blur(sigma=1.0)], background=Threshold(0.3), **given)
    module.configure_model()
    refiner = module._refiner
    assert refiner is not None
    for made in (refiner, refiner.with_steps([Affinity()])):
        assert {name: getattr(made, name) for name in given} == given
        assert made.threshold == 0.3
        assert made.generator is module.generator
    assert refiner.steps == (Blur(sigma=1.0),)
    assert refiner.with_steps([Affinity()]).steps == (Affinity(threshold=0.3),)


@pytest.mark.parametrize(("power", "threshold"), [(1.0, 0.5), (2.0, (3 - 5**0.5) / 2)])
def test_a_power_rule_has_a_threshold_too(sd1_folder: Path, power: float, threshold: float) -> None:
    steps = [Correspondence(), Correspondence(binarise_at=0.3), Correspondence(binarise_at=None)]
    module = G4SegModule(str(sd1_folder), steps, background=PowerBackground(power))
    module.configure_model()
    told = [step.binarise_at for step in module._refiner.steps]  # type: ignore[union-attr]
    assert told == [pytest.approx(threshold, abs=1e-9), 0.3, None]


def test_test_scores_seed_and_refined(tmp_path: Path, sd1_folder: Path) -> None:
    module = G4SegModule(str(sd1_folder), [Correspondence(beta=1.0)], background=Threshold(0.5))
    scores = trainer().test(module, data(tmp_path), verbose=False)[0]
    assert scores["test/n_images"] == 3
    assert scores["test/gain"] == 0
    assert scores["test/seed_miou"] == scores["test/refined_miou"]
    # Each object's seed covers rows 8 to 23 of 8 to 27, and two rows too many above.
    assert 50 < scores["test/seed_miou"] < 100


def test_images_in_which_nothing_was_found_count_where_they_are_kept(
    tmp_path: Path, sd1_folder: Path
) -> None:
    voc, labels = write_voc(tmp_path), tmp_path / "labels"
    labels.mkdir()
    for index, name in enumerate(IDS):
        truth = np.asarray(Image.open(voc / "SegmentationClass" / f"{name}.png"))
        found = np.where((truth == 255) | (index == 1), 0, truth)
        Image.fromarray(found.astype(np.uint8)).save(labels / f"{name}.png")
    module = G4SegModule(str(sd1_folder), [Correspondence(beta=1.0)], background=Threshold(0.5))
    refused = VOCDataModule(tmp_path, labels, num_workers=0)
    assert trainer().test(module, refused, verbose=False)[0]["test/n_images"] == 2
    kept = VOCDataModule(tmp_path, labels, seed_options=ReadOptions(empty="keep"), num_workers=0)
    scores = trainer().test(module, kept, verbose=False)[0]
    evaluate(labels, voc / "SegmentationClass", 21, json=tmp_path / "scores.json")
    expected = json.loads((tmp_path / "scores.json").read_text())["miou"]
    assert scores["test/n_images"] == 3
    assert scores["test/seed_miou"] == pytest.approx(expected)
    assert scores["test/refined_miou"] == pytest.approx(expected)
    writer = MaskWriter(tmp_path / "out", soft="npz")
    trainer(writer).predict(module, kept, return_predictions=False)
    assert writer.summary is not None
    assert writer.summary.done == 3
    assert not np.asarray(Image.open(tmp_path / "out" / "masks" / f"{IDS[1]}.png")).any()


def test_checkpoint_holds_no_weights(tmp_path: Path, sd1_folder: Path) -> None:
    module = G4SegModule(str(sd1_folder))
    runner = trainer()
    runner.predict(module, data(tmp_path), return_predictions=False)
    runner.save_checkpoint(tmp_path / "module.ckpt")
    content = torch.load(tmp_path / "module.ckpt", weights_only=True)
    assert content["state_dict"] == {}
    assert (tmp_path / "module.ckpt").stat().st_size < 50_000


def test_finished_run_loads_no_model(tmp_path: Path, sd1_folder: Path) -> None:
    first, again = (MaskWriter(tmp_path / "out") for _ in range(2))
    module = G4SegModule(str(sd1_folder))
    trainer(first).predict(module, data(tmp_path), return_predictions=False)
    fresh = G4SegModule(str(sd1_folder))
    trainer(again).predict(fresh, data(tmp_path), return_predictions=False)
    assert str(first.summary) == "done 3 / skipped 0 / failed 0 / total 3"
    assert str(again.summary) == "done 0 / skipped 3 / failed 0 / total 3"
    assert fresh.generator is None


def test_other_configuration_is_refused_by_key_unless_overridden(
    tmp_path: Path, sd1_folder: Path
) -> None:
    module = G4SegModule(str(sd1_folder))
    trainer(MaskWriter(tmp_path / "out")).predict(module, data(tmp_path), return_predictions=False)
    other = G4SegModule(str(sd1_folder), seed=1)
    with pytest.raises(ConfigurationError, match=r"model\.init_args\.seed"):
        trainer(MaskWriter(tmp_path / "out")).predict(
            other, data(tmp_path), return_predictions=False
        )
    redo = MaskWriter(tmp_path / "out", override=True)
    trainer(redo).predict(other, data(tmp_path), return_predictions=False)
    assert redo.summary is not None
    assert redo.summary.done == 3


def test_keeping_predictions_is_refused_before_a_model_is_loaded(
    tmp_path: Path, sd1_folder: Path
) -> None:
    module = G4SegModule(str(sd1_folder))
    with pytest.raises(ConfigurationError, match="return_predictions=False"):
        trainer().predict(module, data(tmp_path))
    assert module.generator is None


def test_findings_reach_the_soft_maps_and_the_records(tmp_path: Path, sd1_folder: Path) -> None:
    steps = [Averaged([Blur(2.0)], draws=2), ChooseByLikelihood([[Blur(2.0)]], draws=1)]
    module = G4SegModule(str(sd1_folder), steps)
    writer = MaskWriter(tmp_path / "out", soft="npz")
    trainer(writer).predict(module, data(tmp_path), return_predictions=False)
    with np.load(tmp_path / "out" / "soft" / f"{IDS[1]}.npz") as content:
        assert content["foreground"].dtype == np.float16
        for name in ("foreground", "confidence", "pixel_weights"):
            assert content[name].shape == (2, 64, 48)
        score = content["score"]
        assert score.shape == (2,)
    (record,) = [each for each in read_records(tmp_path / "out") if each["id"] == IDS[1]]
    assert record["score"] == pytest.approx(score.tolist(), abs=1e-6)
    assert record["score_error"] == [None, None]  # one draw has no standard error


def test_second_predict_with_the_same_objects_looks_at_all_images(
    tmp_path: Path, sd1_folder: Path
) -> None:
    module, datamodule = G4SegModule(str(sd1_folder), update=[]), data(tmp_path)
    # The second has all of them left out.
    for folder, done in (("one", 3), ("one", 0), ("two", 3)):
        writer = MaskWriter(tmp_path / folder)
        trainer(writer).predict(module, datamodule, return_predictions=False)
        assert str(writer.summary) == f"done {done} / skipped {3 - done} / failed 0 / total 3"


def test_the_same_trainer_predicts_again(tmp_path: Path, sd1_folder: Path) -> None:
    writer = MaskWriter(tmp_path / "out")
    again, module = trainer(writer), G4SegModule(str(sd1_folder), update=[])
    again.predict(module, data(tmp_path), return_predictions=False)
    again.predict(module, data(tmp_path), return_predictions=False)  # nothing is left
    assert writer.summary is not None
    assert (writer.summary.done, writer.summary.skipped) == (0, len(IDS))
    (tmp_path / "out" / "masks" / f"{IDS[0]}.png").unlink()
    again.predict(module, data(tmp_path), return_predictions=False)
    assert (writer.summary.done, writer.summary.skipped) == (1, len(IDS) - 1)
    writer.override = True
    again.predict(module, data(tmp_path), return_predictions=False)
    assert writer.summary.done == len(IDS)
    assert again.limit_predict_batches == 1.0


class Broken(pl.Callback):
    """Ends a run, once it is told to, when it is set up or with its first batch."""

    at = ""

    def setup(self, *_: Any, **__: Any) -> None:
        """Fail here, if asked to."""
        if self.at == "setup":
            raise RuntimeError

    def on_predict_batch_end(self, *_: Any) -> None:
        """Fail here, if asked to."""
        if self.at == "batch":
            raise RuntimeError


def test_a_trainer_whose_idle_run_failed_predicts_again(tmp_path: Path, sd1_folder: Path) -> None:
    writer, broken, module = MaskWriter(tmp_path), Broken(), G4SegModule(str(sd1_folder), update=[])
    again, images = trainer(writer, broken), data(tmp_path)
    again.predict(module, images, return_predictions=False)
    broken.at = "setup"  # behind the writer, which has found nothing left to do
    with pytest.raises(RuntimeError):
        again.predict(module, images, return_predictions=False)
    assert again.limit_predict_batches == 1.0


def test_a_process_that_fails_says_so(tmp_path: Path, sd1_folder: Path) -> None:
    writer, broken = MaskWriter(tmp_path / "out"), Broken()
    broken.at = "batch"
    with pytest.raises(RuntimeError):
        trainer(writer, broken).predict(
            G4SegModule(str(sd1_folder), update=[]), data(tmp_path), return_predictions=False
        )
    # As rank 0 sees it, which need not wait for it.
    assert ProcessFiles(tmp_path / "out").wait(1, patience=0) == (0,)


def test_a_slow_disk_does_not_let_masks_pile_up(
    tmp_path: Path, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_voc(tmp_path, [f"image{index}" for index in range(6)])
    saved: list[str] = []
    over, save = Event(), OutputFolder.save

    def slow(self: OutputFolder, mask: RefinedMask) -> None:
        over.wait(0.3)  # longer than an image takes
        save(self, mask)
        saved.append(mask.image_id)

    class Waiting(pl.Callback):
        """How many masks wait for the disk after each batch."""

        seen: ClassVar[list[int]] = []

        def on_predict_batch_end(self, *_: Any) -> None:
            """Count them."""
            self.seen.append(len(self.seen) + 1 - len(saved))

        def on_predict_end(self, *_: Any) -> None:
            """Let the rest be written."""
            over.set()

    monkeypatch.setattr(OutputFolder, "save", slow)
    trainer(MaskWriter(tmp_path / "out", threads=1), Waiting()).predict(
        G4SegModule(str(sd1_folder), update=[]),
        data(tmp_path, batch_size=1),
        return_predictions=False,
    )
    assert len(saved) == len(Waiting.seen) == 6
    assert max(Waiting.seen) <= 4 * 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_trainers_half_precision_is_refused(precision: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"set model\.dtype"):
        trainer(precision=precision).predict(
            G4SegModule("nowhere"), data(tmp_path), return_predictions=False
        )


def test_test_without_truth_names_an_image(tmp_path: Path, sd1_folder: Path) -> None:
    datamodule = data(tmp_path, batch_size=1)
    for path in (tmp_path / "VOCdevkit/VOC2012/SegmentationClass").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ConfigurationError, match=rf"3 failed; {IDS[0]}: .*truncated"):
        trainer().test(G4SegModule(str(sd1_folder)), datamodule, verbose=False)
