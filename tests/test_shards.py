"""Two runs over two shards, at the same time and into one folder, as an array of jobs does it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment, masks, records, words
from fake_voc import write_voc

from g4seg_pl.main import main

IDS = [f"image{index}" for index in range(5)]


@pytest.fixture(autouse=True)
def in_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_voc(tmp_path, IDS)
    monkeypatch.chdir(tmp_path)


def run_together(folder: Path, runs: list[list[str]]) -> list[str]:
    """Start the command lines at once in processes that know nothing of each other."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "g4seg_pl.main", *arguments],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for arguments in runs
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(runs), "\n".join(said)
    return [text.splitlines()[-1] for text in said]


@pytest.mark.slow
def test_shards_fill_one_folder_together(
    tmp_path: Path,
    sd1_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words("predict", sd1_folder, "one")) == 0
    shards = [words("predict", sd1_folder, "two", "--data.shard", f"{i}/2") for i in (0, 1)]
    last = run_together(tmp_path, shards)
    assert last == [f"done {n} / skipped 0 / failed 0 / total {n}" for n in (2, 3)]
    assert masks(tmp_path / "two") == masks(tmp_path / "one")
    assert sorted(record["id"] for record in records(tmp_path / "two")) == IDS
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert {record["shard"], *(run["shard"] for run in record["continued"])} == {"0/2", "1/2"}

    (tmp_path / "two" / "masks" / "image0.png").unlink()
    capsys.readouterr()
    assert main(words("predict", sd1_folder, "two")) == 0  # the whole goes on where shards were
    assert capsys.readouterr().out.endswith("done 1 / skipped 4 / failed 0 / total 5\n")
    assert masks(tmp_path / "two") == masks(tmp_path / "one")


def test_shard_without_an_image_is_no_error(
    sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("predict", sd1_folder, "out", "--data.shard", "7/8")) == 0
    assert capsys.readouterr().out == "done 0 / skipped 0 / failed 0 / total 0\n"


def test_wrong_shard_is_refused_before_a_model_is_loaded(
    sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("predict", sd1_folder, "out", "--data.shard", "9/8")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("g4seg predict: error: shard: '9/8' is not i/n")
