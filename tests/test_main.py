"""The command line: dispatch, speed of help, errors, and whole runs in processes of their own."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from command_line import CONFIG, environment, kill_when, masks, scores, words
from fake_voc import write_voc
from PIL import Image

from g4seg_pl.callbacks.progress import ImageProgress
from g4seg_pl.main import COMMANDS, main


def test_help_is_fast_and_imports_no_torch(tmp_path: Path) -> None:
    probe = (
        "import sys; from g4seg_pl.main import main; code = main(['--help']);"
        "heavy = {'torch', 'lightning', 'diffusers', 'numpy'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    # Processor time, which other programs on the machine do not change.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert all(name in result.stdout for name in ("predict", "test", *COMMANDS))


@pytest.mark.slow
def test_feature_extractors_go_by_their_bare_names(tmp_path: Path) -> None:
    """As the README has them, in a process that has imported nothing else of ours."""
    probe = (
        "import json, sys; from g4seg_pl.main import main;"
        "sys.exit(str([main(words) for words in json.loads(sys.argv[1])]))"
    )
    write_voc(tmp_path)
    option = "--model.features"
    of_features = (
        ("OpenClipFeatures", "ViT-B-16-quickgelu", "--model.features.pretrained", "openai"),
        ("TransformersClipFeatures", "openai/clip-vit-base-patch16"),
    )
    runs = [
        words("predict", tmp_path / "none", "out", f"{option}={name}", f"{option}.model", *model)
        for name, *model in of_features
    ]
    result = subprocess.run(
        [sys.executable, "-c", probe, json.dumps(runs)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    *said, statuses = result.stderr.splitlines()
    assert statuses == "[1, 1]"
    # What is missed is the generator, read after all arguments are understood.
    assert sum(str(tmp_path / "none") in line for line in said) == 2, said


def test_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["refine"]) == 2
    assert "no command 'refine'" in capsys.readouterr().err


def test_options_may_be_spelled_with_dashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    folder = str(tmp_path)
    assert main(["evaluate", "--pred", folder, "--gt", folder, "--num-classes", "2"]) == 0
    assert main(["evaluate", "--pred", folder, "--gt", folder, "--num_classes=2"]) == 0
    assert "mIoU 100.00" in capsys.readouterr().out


CONFIGURATIONS = {
    "misspelt_section.yaml": "modle:\n  init_args:\n    seed: 3\n",
    "misspelt_key.yaml": (
        "model:\n  init_args:\n    update:\n"
        "    - class_path: g4seg_pl.core.steps.Correspondence\n      init_args: {timestp: 3}\n"
    ),
    "unreadable.yaml": "model:\n  - init_args: [\n",
}


REFUSED = [
    (["--model.model", "nowhere"], "nowhere"),
    (["--data.root", "missing"], "missing"),
    (["--data.root", ".", "--out", "unreadable.yaml"], "out: unreadable.yaml is a file"),
    (["--data.split", "holdout"], "holdout"),
    (["--model.update.beta", "2"], "beta"),
    (["--model.prompt_template", "A photo"], "prompt_template"),
    (["--model.working_size", "500"], "working_size is 500: give a multiple of 8"),
]
UNPARSED = [
    (["--no.such", "1"], "no option --no.such"),
    (["--model.seeed", "1"], "G4SegModule has no argument 'seeed'; did you mean seed?"),
    (["--model.update.betta", "1"], "Correspondence has no argument 'betta'"),
    (["--data.splitt", "x"], "VOCDataModule has no argument 'splitt'; did you mean split?"),
    (["--trainer.devicez", "2"], "did you mean --trainer.devices?"),
    (["--model.seed", "abc"], "model.seed is 'abc': give a value of type int"),
    (["--data.orientation", "up"], "data.orientation is 'up': give one of 'stored', 'exif'"),
    (["--data.dialect", "x"], "data.dialect is 'x': give one of 'clip_es'"),
    (["--model.features", "Nope"], "model.features is 'Nope': no such class"),
    (["-c", "misspelt_section.yaml"], "no section 'modle'; did you mean model?"),
    (["-c", "misspelt_key.yaml"], "has no argument 'timestp'; did you mean timestep?"),
    (["-c", "unreadable.yaml"], "line 3"),
    (["-c", "missing.yaml"], "missing.yaml"),
    (["stray"], "cannot place 'stray'"),
]


@pytest.mark.parametrize(
    ("status", "more", "said"),
    [*((1, *each) for each in REFUSED), *((2, *each) for each in UNPARSED)],
)
def test_configuration_error_stops_before_a_model_is_loaded(
    tmp_path: Path,
    sd1_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    more: list[str],
    said: str,
) -> None:
    if any(
        word in more[0] for word in ("data.root", "data.split", "prompt", "model.model", "_size")
    ):
        write_voc(tmp_path)  # the others are refused before any data are looked at
    for name, text in CONFIGURATIONS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(words("predict", sd1_folder, "out", *more)) == status
    (line,) = capsys.readouterr().err.splitlines()  # no traceback, no "Loading weights"
    assert line.startswith("g4seg predict: error: ")
    assert said in line


def test_model_folder_without_unet_is_named(
    tmp_path: Path,
    sd1_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_voc(tmp_path)
    broken = tmp_path / "model"
    broken.mkdir()
    for part in sd1_folder.iterdir():
        if part.name != "unet":
            (broken / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    assert main(words("predict", broken, "out")) == 1
    assert "unet" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_resumed_run_gives_the_same_files(
    tmp_path: Path,
    sd1_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = [f"image{index:03}" for index in range(60)]
    write_voc(tmp_path, ids)
    monkeypatch.chdir(tmp_path)
    assert main(words("predict", sd1_folder, "whole", "--data.batch_size", "8")) == 0
    one_by_one = words("predict", sd1_folder, "killed", "--data.batch_size", "1")
    kill_after_first_masks(tmp_path, one_by_one)
    done = {name.removesuffix(".png") for name in masks(tmp_path / "killed")}
    assert done, "the run wrote nothing"
    assert done != set(ids), "the run ended before it was killed"
    capsys.readouterr()
    assert main(words("predict", sd1_folder, "killed", "--data.batch_size", "8")) == 0
    assert masks(tmp_path / "killed") == masks(tmp_path / "whole")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"done {60 - len(done)} / skipped {len(done)} / failed 0 / total 60"


def kill_after_first_masks(folder: Path, arguments: Sequence[str]) -> None:
    written = folder / "killed" / "masks"
    kill_when(lambda: len(list(written.glob("*.png"))) >= 3, folder, arguments)


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_does_so_between_batches(
    tmp_path: Path, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster sends SIGTERM to every process before it takes its machine back."""
    write_voc(tmp_path, [f"image{index:03}" for index in range(60)])
    more = ["--data.batch_size", "1", "--data.num_workers", "2"]
    arguments = words("predict", sd1_folder, "ended", *more)
    written = tmp_path / "ended" / "masks"
    status = kill_when(
        lambda: len(list(written.glob("*.png"))) >= 3, tmp_path, arguments, signal.SIGTERM
    )
    assert status == 128 + signal.SIGTERM
    done = len(masks(tmp_path / "ended"))
    assert 3 <= done < 60
    monkeypatch.chdir(tmp_path)
    assert main(words("predict", sd1_folder, "ended", "--data.batch_size", "8")) == 0
    assert len(masks(tmp_path / "ended")) == 60


def test_scores_that_were_asked_to_end_do_not_pass_for_finished(
    tmp_path: Path,
    sd1_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    write_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImageProgress, "on_test_batch_start", ask)
    with pytest.raises(SystemExit) as ended:
        main(words("test", sd1_folder, "scores", "--data.batch_size", "1"))
    assert ended.value.code == 143
    assert "ended by SIGTERM; nothing of it is kept" in capsys.readouterr().err
    assert not (tmp_path / "scores" / "test.json").exists()


def test_second_run_has_nothing_to_do_and_loads_no_model(
    tmp_path: Path,
    sd1_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(words("predict", sd1_folder, "out")) == 0
    capsys.readouterr()
    assert main(words("predict", sd1_folder, "out")) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "nothing left to do: every image is finished",
        "done 0 / skipped 3 / failed 0 / total 3",
    ]
    assert "Loading weights" not in printed.err


def test_scores_of_test_are_those_of_the_masks_predict_writes(
    tmp_path: Path, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pydensecrf")
    write_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    crf = ["-c", str(CONFIG.with_name("crf_clip_es.yaml"))]
    assert main(words("predict", sd1_folder, "refined")) == 0
    assert main(words("predict", sd1_folder, "sharpened", *crf)) == 0
    assert main(words("test", sd1_folder, "scores", *crf)) == 0
    found = scores(tmp_path / "scores")
    assert [row["name"] for row in found["rows"]] == ["seed", "refined", "refined+crf"]
    assert "bilateral_width=67" in found["crf"]
    for row, folder in zip(found["rows"][1:], ("refined", "sharpened"), strict=True):
        assert row["miou"] == pytest.approx(mean_iou(tmp_path, folder), rel=1e-6)
        assert row["gain"] == pytest.approx(row["miou"] - found["rows"][0]["miou"], abs=1e-4)
    assert found["rows"][1]["miou"] != found["rows"][2]["miou"]


def mean_iou(root: Path, folder: str) -> float:
    """In percent, over the labels that occur, by a histogram of all pixels."""
    truth, found = [], []
    for path in (root / folder / "masks").glob("*.png"):
        labels = root / "VOCdevkit" / "VOC2012" / "SegmentationClass" / path.name
        truth.append(np.asarray(Image.open(labels)).ravel())
        found.append(np.asarray(Image.open(path)).ravel())
    right, ours = np.concatenate(truth), np.concatenate(found)
    ours, right = ours[right != 255], right[right != 255]
    labels = np.union1d(right, ours)
    shared = [np.sum((right == label) & (ours == label)) for label in labels]
    either = [np.sum((right == label) | (ours == label)) for label in labels]
    return float(100 * np.mean(np.divide(shared, either)))
