"""The command line: every configuration trains, scores and predicts; a killed run goes on."""

import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from fake_voc import IDS
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from PIL import Image
from segmentation.test_networks import TINY_SEGFORMER
from segmentation.trees import label_file, write_tree

from g4seg_pl.checkpoint_files import WholeCheckpointIO
from g4seg_pl.segmentation.cli import main, run
from g4seg_pl.segmentation.pictures import PictureLogger
from g4seg_pl.segmentation.segformer import SegFormer

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs" / "train"
FRAGMENTS = ("ema", "early_stop", "confident", "crf")
WHOLE = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in FRAGMENTS)

# Configurations validate by steps, thousands of them.
VALIDATED_AT_ITS_END = (
    *("--trainer.val_check_interval", "2"),
    *("--trainer.check_val_every_n_epoch", "null"),
)

OTHER_NETWORK = """
model:
  init_args:
    network:
      class_path: segmentation_models_pytorch.DeepLabV3Plus
      init_args: {encoder_name: resnet18, encoder_weights: null, classes: 21}
    size_multiple: 16
"""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weights_only"),
    pytest.mark.filterwarnings("ignore:.*Precision bf16-mixed is not supported by the model"),
]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tree(tmp_path)
    voc = tmp_path / "VOCdevkit/VOC2012"
    lists = voc / "ImageSets/Segmentation"
    for name in ("train_aug", "test"):
        shutil.copy(lists / "train.txt", lists / f"{name}.txt")
    shutil.copytree(voc / "SegmentationClass", voc / "SegmentationClassAug")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_coco(root: Path) -> None:
    """The same pictures and masks in COCO's layout."""
    voc = root / "VOCdevkit/VOC2012"
    for split in ("train2014", "val2014"):
        shutil.copytree(voc / "JPEGImages", root / "COCO2014/JPEGImages" / split)
        shutil.copytree(voc / "SegmentationClass", root / "COCO2014/SegmentationClass" / split)


def words(root: Path, config: str) -> list[str]:
    """What makes a configuration fit three small pictures and random weights."""
    found = ["-c", str(CONFIGS / f"{config}.yaml"), "--data.labels", "refined"]
    found += ["--data.augmentation.crop_size", "48", "--data.batch_size", "2"]
    found += ["--data.num_workers", "0", "--data.val_batch_size", "1", "--trainer.accelerator"]
    found += ["cpu", "--trainer.enable_progress_bar", "false", "--run", "run"]
    found += ["--trainer.enable_model_summary", "false"]
    if config.startswith("coco"):
        write_coco(root)
    if config == "scenes_small":
        found += ["--data.images.root", "VOCdevkit/VOC2012", "--data.images.class_names", "voc"]
        return [*found, "--model.network.num_labels", "21", "--model.network.width", "4"]
    if "segformer" in config:
        encoder = transformers.SegformerModel(transformers.SegformerConfig(**TINY_SEGFORMER))
        encoder.save_pretrained(root / "mit")
        return [*found, "--model.network.model", "mit"]
    found += ["--model.network.depth", "resnet50", "--model.network.weights", "random"]
    return found


@pytest.mark.parametrize("config", WHOLE)
def test_two_steps_of_every_configuration(root: Path, config: str) -> None:
    two = ["--trainer.max_steps", "2", *VALIDATED_AT_ITS_END]
    # Dry runs take the configuration's own bfloat16, for which many CPUs have no arithmetic.
    two += ["--trainer.precision", "32-true"]
    # Checkpoints of the large networks are not written: that would take longer than the rest.
    bare = ["--trainer.logger", "false", "--best.save_top_k", "0", "--last.save_top_k", "0"]
    cli = run(["fit", *words(root, config), *two, *bare])
    assert cli.trainer.global_step == 2
    assert 0 <= cli.trainer.callback_metrics["val/miou"] <= 100
    assert np.isfinite(float(cli.trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize("config", WHOLE)
def test_dry_run_of_every_configuration(root: Path, config: str) -> None:
    assert main(["fit", *words(root, config), "--trainer.fast_dev_run", "true"]) == 0
    assert not (root / "run").exists()


def test_dry_run_with_every_addition(root: Path) -> None:
    pytest.importorskip("pydensecrf")
    layers = [word for name in FRAGMENTS for word in ("-c", str(CONFIGS / f"{name}.yaml"))]
    arguments = [*words(root, "scenes_small"), *layers, "--trainer.fast_dev_run", "true"]
    assert main(["fit", *arguments]) == 0


def test_somebody_elses_network_by_its_class(root: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    network = root / "network.yaml"
    network.write_text(OTHER_NETWORK)
    arguments = words(root, "voc_deeplabv3plus_r50")
    # The configuration's own network has other arguments.
    cut = arguments.index("--model.network.depth")
    two = ["--trainer.max_steps", "2", *VALIDATED_AT_ITS_END]
    bare = ["--trainer.logger", "false", "--best.save_top_k", "0", "--last.save_top_k", "0"]
    cli = run(["fit", *arguments[:cut], "-c", str(network), *two, *bare])
    assert type(cli.model.network).__module__.startswith("segmentation_models_pytorch")
    groups = cli.trainer.optimizers[0].param_groups
    assert [group["name"] for group in groups] == ["backbone", "head"]
    assert groups[1]["initial_lr"] == pytest.approx(10 * groups[0]["initial_lr"])


def test_a_run_from_training_to_the_test_server(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = words(root, "scenes_small")
    layers = [
        word
        for name in ("ema", "early_stop", "confident", "crf")
        for word in ("-c", str(CONFIGS / f"{name}.yaml"))
    ]
    fit = [*base, *layers, "--trainer.max_steps", "2", "--trainer.check_val_every_n_epoch", "1"]
    assert main(["fit", *fit]) == 0
    assert (root / "run/best.ckpt").is_file()
    logs = next((root / "run").rglob("config.yaml"))
    assert "EMAWeightAveraging" in logs.read_text()
    assert "EarlyStopping" in logs.read_text()
    assert not (root / "outputs").exists(), "nothing is predicted yet"
    assert main(["validate", *base]) == 0
    assert "val/miou" in capsys.readouterr().out
    assert main(["test", *base, "-c", str(CONFIGS / "crf.yaml")]) == 0
    assert "test/miou" in capsys.readouterr().out
    server = ["--trainer.callbacks", "g4seg_pl.segmentation.voc_server.VOCServerWriter"]
    server += ["--trainer.callbacks.out", "server"]
    assert main(["predict", *base, "--out", "predicted", *server]) == 0
    folder = root / "server/results/VOC2012/Segmentation/comp6_test_cls"
    for image_id in IDS:
        written = label_file(root / "predicted/masks" / f"{image_id}.png")
        assert np.array_equal(label_file(folder / f"{image_id}.png"), written)
    capsys.readouterr()
    again = ["predict", *base, "--out", "predicted"]
    assert main([*again, "--ckpt_path", "run/last.ckpt"]) == 1
    assert "differs in model.init_args.checkpoint" in capsys.readouterr().err
    assert main([*again, "--trainer.callbacks", "g4seg_pl.callbacks.crf.DenseCRF"]) == 1
    assert "not those of SegmentationModule; set its own argument" in capsys.readouterr().err


def test_published_weights_are_not_fetched_for_a_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    load = SegFormer.load_pretrained
    monkeypatch.setattr(
        SegFormer, "load_pretrained", lambda self: fetched.append("weights") or load(self)
    )
    base = [*words(root, "voc_segformer_b1"), "--trainer.precision", "32-true"]
    steps = [*VALIDATED_AT_ITS_END, "--trainer.logger", "false"]
    assert main(["fit", *base, *steps, "--trainer.max_steps", "2"]) == 0
    assert fetched == ["weights"]
    goes_on = ["--trainer.max_steps", "4", "--ckpt_path", "last"]
    assert main(["fit", *base, *steps, *goes_on]) == 0
    assert main(["validate", *base]) == 0
    assert fetched == ["weights"]


def test_a_picture_of_a_batch(root: Path) -> None:
    base = words(root, "scenes_small")
    assert main(["show", *base, "--picture", "seen/batch.png"]) == 0
    # Two pictures of 48 by 48, each with its mask.
    with Image.open(root / "seen/batch.png") as picture:
        assert picture.size == (4 * 48 + 2, 48)


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("on_train_batch_start", "nothing of it is kept: the same command begins anew"),
        ("on_train_epoch_end", "the same command with --ckpt_path last goes on from run/last.ckpt"),
    ],
)
def test_a_training_that_is_asked_to_end_does_not_pass_for_finished(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    hook: str,
    said: str,
) -> None:
    def ask(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    base = [*words(root, "scenes_small"), "--trainer.logger", "false"]
    steps = ["--trainer.max_steps", "3", "--trainer.check_val_every_n_epoch", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(PictureLogger, hook, ask)
        with pytest.raises(SystemExit) as ended:
            main(["fit", *base, *steps])
    assert ended.value.code == 143
    assert capsys.readouterr().err.splitlines()[-1] == f"ended by SIGTERM; {said}"
    goes_on = ["--ckpt_path", "last"] if "last" in said else []
    cli = run(["fit", *base, *steps, *goes_on])
    assert cli.trainer.global_step == 3

    with monkeypatch.context() as patch:
        patch.setattr(PictureLogger, "on_validation_batch_start", ask)
        with pytest.raises(SystemExit) as ended:
            main(["validate", *base])
    assert ended.value.code == 143


@pytest.mark.parametrize(
    ("status", "command", "more", "said"),
    [
        (1, "fit", ["--data.labels", "nowhere"], "nowhere"),
        (1, "fit", ["--data.images.split", "holdout"], "holdout"),
        (1, "fit", ["--model.loss", "g4seg_pl.segmentation.losses.SoftCrossEntropy"], "data.soft"),
        (2, "fit", ["--no.such", "1"], "no.such"),
        (1, "fit", ["--data.augmentation.flip", "3"], "flip"),
        (1, "test", [], "run/best.ckpt"),
    ],
)
def test_errors_are_one_message(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    status: int,
    command: str,
    more: list[str],
    said: str,
) -> None:
    arguments = [*words(root, "scenes_small"), "--trainer.logger", "false", *more]
    assert main([command, *arguments]) == status
    assert said in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main(["refine"]) == 2
    assert capsys.readouterr().out.count("fit") > 2


def losses(run: Path) -> dict[int, float]:
    """The loss of every step in all the CSV logs of a run; later logs win."""
    found: dict[int, float] = {}
    for path in sorted(run.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime):
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/loss"]]
        found |= {int(row["step"]): float(row["train/loss"]) for row in rows}
    return found


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "run" / "last.ckpt"
    files = WholeCheckpointIO()
    files.save_checkpoint({"step": torch.tensor(1)}, kept)

    def disk_is_full(descriptor: int) -> None:
        (half,) = (path for path in kept.parent.iterdir() if path != kept)
        assert half.stat().st_size > 0, "it lies on the same file system"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_is_full)
        with pytest.raises(OSError, match="No space left"):
            files.save_checkpoint({"step": torch.tensor(2)}, kept)
    assert list(kept.parent.iterdir()) == [kept]
    assert files.load_checkpoint(kept)["step"] == 1
    files.save_checkpoint({"step": torch.tensor(3)}, kept)
    assert list(kept.parent.iterdir()) == [kept]
    assert files.load_checkpoint(kept)["step"] == 3


def test_the_temporary_folder_has_no_part_in_checkpoints(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(root / "missing"))
    bare = ["--trainer.logger", "false", "--trainer.max_steps", "2", *VALIDATED_AT_ITS_END]
    cli = run(["fit", *words(root, "scenes_small"), *bare])
    assert isinstance(cli.trainer.strategy.checkpoint_io, WholeCheckpointIO)
    assert sorted(path.name for path in (root / "run").glob("*")) == ["best.ckpt", "last.ckpt"]


def test_a_way_of_saving_that_was_asked_for_is_kept(root: Path) -> None:
    asked = ["--trainer.plugins", "lightning.pytorch.plugins.io.AsyncCheckpointIO"]
    cli = run(["fit", *words(root, "scenes_small"), *asked, "--trainer.fast_dev_run", "true"])
    assert isinstance(cli.trainer.strategy.checkpoint_io, AsyncCheckpointIO)


@pytest.mark.slow
def test_killed_process_goes_on_as_if_nothing_had_happened(root: Path) -> None:
    def command(run: str) -> list[str]:
        logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", run]
        logger += ["--trainer.logger.flush_logs_every_n_steps", "1", "--run", run]
        steps = ["--trainer.max_steps", "18", "--trainer.log_every_n_steps", "1"]
        steps += ["--trainer.check_val_every_n_epoch", "1", "--data.batch_size", "1"]
        script = [sys.executable, str(REPOSITORY / "train_seg.py"), "fit"]
        base = words(root, "scenes_small")
        return [*script, *base, *steps, *logger, "--ckpt_path", "last"]

    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command("whole"), env=environment, check=True, capture_output=True)
    killed = subprocess.Popen(
        command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    began = time.monotonic()
    checkpoint = root / "killed/last.ckpt"
    while not checkpoint.exists() and killed.poll() is None and time.monotonic() - began < 120:
        time.sleep(0.005)
    # Otherwise what follows would compare two runs that nothing happened to.
    assert checkpoint.exists()
    assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run(command("killed"), env=environment, check=True, capture_output=True)
    assert len(losses(root / "whole")) == 18
    assert losses(root / "killed") == pytest.approx(losses(root / "whole"))
