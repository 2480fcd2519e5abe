"""What a run must not remove, mix or lose in its output folder."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import masks, words
from fake_voc import write_voc

import g4seg_pl.cli
from datamodules.classes import read_class_list
from g4seg_pl.callbacks.folder_lock import ProcessLock
from g4seg_pl.main import main


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_masks_that_no_run_made_are_never_removed(
    tree: Path, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tree / "VOCdevkit" / "VOC2012" / "SegmentationClass", tree / "data" / "masks")
    before = masks(tree / "data")
    for more in ([], ["--override"]):
        assert main(words("predict", sd1_folder, "data", *more)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "no run.json" in line
        assert "--override" not in line
    assert masks(tree / "data") == before


def test_a_run_does_not_write_where_its_seeds_lie(
    tree: Path, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = tree / "made" / "soft"
    shutil.copytree(tree / "cam_out", seeds)
    names = {path.name for path in seeds.iterdir()}
    command = words("predict", sd1_folder, "made", "--data.seeds", str(seeds), "--override")
    assert main(command) == 1
    assert f"data.seeds is {seeds}" in capsys.readouterr().err
    assert {path.name for path in seeds.iterdir()} == names


def test_the_written_configuration_does_not_override(tree: Path, sd1_folder: Path) -> None:
    assert main(words("predict", sd1_folder, "out", "--override")) == 0
    written = yaml.safe_load((tree / "out" / "config.yaml").read_text())
    assert written["override"] is False
    times = {path: path.stat().st_mtime_ns for path in (tree / "out" / "masks").iterdir()}
    assert main(["predict", "-c", "out/config.yaml"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tree / "out" / "masks").iterdir()} == times


def test_a_writer_without_threads_is_refused_before_masks_are_removed(
    tree: Path, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("predict", sd1_folder, "out")) == 0
    before = masks(tree / "out")
    options = ["--writer.threads", "0", "--override"]
    capsys.readouterr()
    assert main(words("predict", sd1_folder, "out", *options)) == 1
    assert "threads is 0: give 1 or more" in capsys.readouterr().err
    assert masks(tree / "out") == before


def test_another_class_list_is_another_configuration(
    tree: Path, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(read_class_list("voc").names)
    classes = tree / "classes.txt"
    command = words("predict", sd1_folder, "out", "--data.class_names", str(classes))
    classes.write_text("\n".join(names))
    assert main(command) == 0
    for changed in ([*names[1:], names[0]], [f"{names[0]} | plane", *names[1:]]):
        classes.write_text("\n".join(changed))
        capsys.readouterr()
        assert main(command) == 1
        assert "differs in classes" in capsys.readouterr().err


def test_scores_are_told_before_they_are_written(
    tree: Path,
    sd1_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tree / "file").touch()
    assert main(words("test", sd1_folder, "file/out")) == 1
    assert "out: file/out cannot be made" in capsys.readouterr().err

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(g4seg_pl.cli, "write_text_atomically", full)
    assert main(words("test", sd1_folder, "scores")) == 1
    printed = capsys.readouterr()
    assert "refined" in printed.out
    assert "No space left" in printed.err


def test_a_full_disk_is_named_though_nothing_more_can_be_written_there(
    sd1_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("g4seg_pl.callbacks.output_folder.write_bytes_atomically", full)
    monkeypatch.setattr("g4seg_pl.callbacks.processes.ProcessFiles.finish", full)
    assert main(words("predict", sd1_folder, "out")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last
    assert "cannot be written to out: [Errno 28] No space left on device" in last


def test_a_part_that_is_being_made_is_not_made_a_second_time(
    tree: Path,
    sd1_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("g4seg_pl.callbacks.folder_lock.HANDOVER", 0)
    (tree / "out").mkdir()
    other = ProcessLock(tree / "out" / ".lock.rank0")
    assert other.take()
    assert main(words("predict", sd1_folder, "out")) == 1
    assert "out: another run over the same part of the data" in capsys.readouterr().err
    assert not masks(tree / "out")
    assert main(words("predict", sd1_folder, "out", "--data.shard", "1/3")) == 0
    other.release()
    assert main(words("predict", sd1_folder, "out")) == 0
    assert other.take()  # a run that has ended holds nothing
    other.release()


def test_a_progress_bar_can_be_switched_off_or_be_another(
    sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off = ["--trainer.enable_progress_bar", "false"]
    assert main(words("predict", sd1_folder, "out", *off)) == 0
    assert "images/s" not in capsys.readouterr().err
    another = ["--trainer.callbacks+", "lightning.pytorch.callbacks.TQDMProgressBar"]
    assert main(words("predict", sd1_folder, "other", *another)) == 0
    assert np.all([len(masks(Path(name))) == 3 for name in ("out", "other")])
