"""The command line: dispatch, speed of help, errors, and whole runs in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fake_voc import write_voc
from PIL import Image

from g4seg_pl.main import COMMANDS, main

# LightningCLI 2.6 calls what jsonargparse 4.53 has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs" / "refine" / "voc_clip_es.yaml"


def command(*words: str) -> list[str]:
    """The command line as a process."""
    return [sys.executable, "-m", "g4seg_pl.main", *words]


def environment() -> dict[str, str]:
    """This process's environment, one thread, our packages importable from anywhere."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder."""
    return subprocess.run(
        command(*words),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def predict_words(model: Path, out: str, *more: str) -> list[str]:
    """The arguments of the issue's own command line."""
    words = ["predict", "-c", str(CONFIG), "--data.root", "VOCdevkit/VOC2012"]
    words += ["--data.seeds", "cam_out", "--model.model", str(model), "--out", out]
    return [*words, "--trainer.accelerator", "cpu", "--data.num_workers", "0", *more]


def masks(out: Path) -> dict[str, bytes]:
    """The label files by name."""
    return {path.name: path.read_bytes() for path in sorted((out / "masks").iterdir())}


def records(out: Path) -> list[dict[str, object]]:
    """All records of a folder."""
    files = sorted(out.glob("records.*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def test_help_is_fast_and_imports_no_torch(tmp_path: Path) -> None:
    probe = (
        "import sys; from g4seg_pl.main import main; code = main(['--help']);"
        "heavy = {'torch', 'lightning', 'diffusers', 'numpy'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - began < 1
    assert all(name in result.stdout for name in ("predict", "test", *COMMANDS))


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


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model.model", "nowhere"], "nowhere"),
        (["--data.root", "missing"], "missing"),
        (["--data.split", "holdout"], "holdout"),
        (["--model.update.beta", "2"], "beta"),
        (["--model.prompt_template", "A photo"], "prompt_template"),
        (["--no.such", "1"], "no.such"),
    ],
)
def test_configuration_error_stops_before_a_model_is_loaded(
    tmp_path: Path,
    sd1_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    said: str,
) -> None:
    write_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(predict_words(sd1_folder, "out", *more)) != 0
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert "Loading weights" not in error


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
    assert main(predict_words(broken, "out")) == 1
    assert "unet" in capsys.readouterr().err


@pytest.mark.slow
def test_bad_items_fail_by_name_and_the_run_goes_on(tmp_path: Path, sd1_folder: Path) -> None:
    ids = ["good", "no_image", "no_seed", "cut_seed", "size", "nan", "cut_image", "unknown"]
    voc, seeds = write_voc(tmp_path, ids), tmp_path / "cam_out"
    (voc / "JPEGImages" / "no_image.jpg").unlink()
    (seeds / "no_seed.npy").unlink()
    cut = seeds / "cut_seed.npy"
    cut.write_bytes(cut.read_bytes()[:60])
    image = voc / "JPEGImages" / "cut_image.jpg"
    image.write_bytes(image.read_bytes()[:200])
    replace_seed(seeds / "size.npy", np.full((1, 7, 9), 0.5, np.float16))
    replace_seed(seeds / "nan.npy", np.full((1, 33, 70), np.nan, np.float16))
    replace_seed(seeds / "unknown.npy", np.full((1, 64, 48), 0.5, np.float16), key=77)
    with (voc / "ImageSets" / "Segmentation" / "train.txt").open("a") as file:
        file.write("../escape\n")
    result = run(tmp_path, *predict_words(sd1_folder, "out"))
    assert result.returncode == 1
    failed = {str(r["id"]): r["error"] for r in records(tmp_path / "out") if "error" in r}
    assert set(failed) == {*ids[1:], "../escape"}
    assert list(masks(tmp_path / "out")) == ["good.png"]
    assert result.stdout.splitlines()[-1] == "done 1 / skipped 0 / failed 8 / total 9"
    assert "Traceback" not in result.stderr


def replace_seed(path: Path, maps: np.ndarray, key: int = 0) -> None:
    """A CLIP-ES seed file with one class."""
    content = {"keys": np.array([key]), "attn_highres": maps}
    np.save(path, content, allow_pickle=True)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path, sd1_folder: Path) -> None:
    write_voc(tmp_path, [f"image{index}" for index in range(5)])
    one = run(tmp_path, *predict_words(sd1_folder, "one"))
    two_ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    two = run(tmp_path, *predict_words(sd1_folder, "two", *two_ranks))
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert masks(tmp_path / "one") == masks(tmp_path / "two")
    ids = [record["id"] for record in records(tmp_path / "two")]
    assert sorted(ids) == [f"image{index}" for index in range(5)]
    ranks = {path.name for path in (tmp_path / "two").glob("records.*")}
    assert ranks == {"records.rank0.jsonl", "records.rank1.jsonl"}
    assert two.stdout.splitlines()[-1] == "done 5 / skipped 0 / failed 0 / total 5"


@pytest.mark.slow
def test_killed_and_resumed_run_gives_the_same_files(tmp_path: Path, sd1_folder: Path) -> None:
    ids = [f"image{index:03}" for index in range(60)]
    write_voc(tmp_path, ids)
    words = ["--data.batch_size", "1"]
    whole = run(tmp_path, *predict_words(sd1_folder, "whole", *words))
    assert whole.returncode == 0, whole.stderr
    kill_after_first_masks(tmp_path, predict_words(sd1_folder, "killed", *words))
    left = set(ids) - {name.removesuffix(".png") for name in masks(tmp_path / "killed")}
    assert left, "the run ended before it was killed"
    resumed = run(tmp_path, *predict_words(sd1_folder, "killed", *words))
    assert resumed.returncode == 0, resumed.stderr
    assert masks(tmp_path / "killed") == masks(tmp_path / "whole")
    assert f"/ failed 0 / total {len(ids)}" in resumed.stdout.splitlines()[-1]


def kill_after_first_masks(folder: Path, words: Sequence[str]) -> None:
    """Start a run and kill it, without a chance to clean up, once some masks are there."""
    process = subprocess.Popen(
        command(*words),
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if len(list((folder / "killed" / "masks").glob("*.png"))) >= 3:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
