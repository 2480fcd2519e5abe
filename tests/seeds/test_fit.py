"""`g4seg fit` on a VOC tree of three images, then `g4seg predict` from its checkpoint."""

import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fake_voc import CLASSES, IDS, SIZES, write_voc

from g4seg_pl.main import main
from g4seg_pl.seeds.classifier import ResNetClassifier, read_weights
from g4seg_pl.seeds.fit import EpochLoss

CONFIGS = Path(__file__).parents[2] / "configs" / "seeds"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that `fit` and `predict` share."""
    voc = write_voc(tmp_path)
    rows = zip(IDS, CLASSES, strict=True)
    lines = [f"{name} {' '.join(str(label - 1) for label in labels)}" for name, labels in rows]
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    given = ["--data.root", str(voc), "--data.labels", "labels.txt", "--data.num_workers", "0"]
    return [*given, "--data.split", "train", "--trainer.accelerator", "cpu"]


def fit(words: list[str], *more: str) -> int:
    small = ["--model.architecture", "resnet18", "--model.imagenet", "false", "--model.crop", "48"]
    small += ["--model.longer_side", "[40, 60]", "--data.batch_size", "2", "--out", "fit"]
    return main(["fit", "-c", str(CONFIGS / "cam_fit.yaml"), *words, *small, *more])


def test_fit_then_predict(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(words, "--trainer.max_epochs", "1") == 0
    assert "epoch 1 of 1: loss 0." in capsys.readouterr().out
    assert sorted(path.name for path in Path("fit").iterdir()) == ["classifier.ckpt", "config.yaml"]
    assert yaml.safe_load(Path("fit/config.yaml").read_text())["model"]["init_args"]["crop"] == 48
    first = read_weights("fit/classifier.ckpt")
    assert first["head.weight"].shape == (20, 512, 1, 1)

    # The same beginning, one epoch more.
    assert fit(words, "--trainer.max_epochs", "2") == 0
    assert "epoch 2 of 2" in capsys.readouterr().out
    second = read_weights("fit/classifier.ckpt")
    assert not torch.equal(first["head.weight"], second["head.weight"])
    # The stages that IRN freezes stay as they were.
    frozen = [name for name in first if name.startswith(("resnet.conv1", "resnet.layer1"))]
    assert frozen
    assert all(torch.equal(first[name], second[name]) for name in frozen)
    ResNetClassifier("resnet18", 20).load_state_dict(second)
    assert fit(words, "--trainer.max_epochs", "3", "--ckpt_path", "last") == 0
    told = capsys.readouterr().out
    assert "epoch 3 of 3" in told
    assert "epoch 1 of 3" not in told, "from the beginning"

    maps = ["--model.architecture", "resnet18", "--model.weights", "fit/classifier.ckpt"]
    maps += ["--model.scales", "[1.0]", "--out", "cam"]
    assert main(["predict", "-c", str(CONFIGS / "cam.yaml"), *words, *maps]) == 0
    for name, labels, size in zip(IDS, CLASSES, SIZES, strict=True):
        # Read plainly: the map of a class that such weights see nowhere may be empty.
        made = np.load(f"cam/soft/{name}.npy", allow_pickle=True).item()
        assert sorted((made["keys"] + 1).tolist()) == sorted(labels)
        assert made["high_res"].shape == (len(labels), *size)
        assert made["high_res"].min() >= 0
        assert made["high_res"].max() <= 1


def test_the_temporary_folder_has_no_part_in_checkpoints(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is another file system, a checkpoint moved out of it may be lost half way."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert fit(words, "--trainer.max_epochs", "1") == 0
    assert sorted(path.name for path in Path("fit").iterdir()) == ["classifier.ckpt", "config.yaml"]


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("on_train_batch_start", "nothing of it is kept: the same command begins anew"),
        ("on_train_epoch_end", "the same command with --ckpt_path last goes on from {}"),
    ],
)
def test_a_training_that_is_asked_to_end_does_not_pass_for_finished(
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    hook: str,
    said: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(EpochLoss, hook, lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            fit(words, "--trainer.max_epochs", "2", "--data.batch_size", "1")
    assert ended.value.code == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "ended by SIGTERM; " + said.format("fit/classifier.ckpt")
    assert fit(words, "--trainer.max_epochs", "2", "--ckpt_path", "last") == 0
    assert "epoch 2 of 2" in capsys.readouterr().out


def test_images_that_cannot_be_read_are_named(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    next(Path().rglob(f"{IDS[1]}.jpg")).write_bytes(b"no picture")
    assert fit(words, "--trainer.max_epochs", "2", "--data.batch_size", "1") == 1
    assert f"failed {IDS[1]}: " in capsys.readouterr().err
    assert Path("fit/classifier.ckpt").is_file()


@pytest.mark.parametrize(
    ("status", "more", "said"),
    [
        (2, ["--model.arch", "x"], "Cam has no argument 'arch'"),
        (1, ["--data.root", "missing"], "missing"),
        (2, ["--no.such", "1"], "no option"),
    ],
)
def test_errors_are_one_sentence(
    words: list[str],
    status: int,
    more: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fit(words, *more) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("g4seg fit: error: ")
    assert said in line
