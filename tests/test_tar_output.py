"""`g4seg predict --writer.tar` from end to end: the masks of the folder form, whatever happens."""

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import kill_when, masks, records, tar_masks, words
from fake_voc import write_voc

from g4seg_pl.callbacks.tar_samples import id_of, whole_samples
from g4seg_pl.main import main

IDS = ["image0", "image.1", "image.2.b", "image%3", "image4"]
SHARDS = [("1of2.rank0", 0), ("1of2.rank0", 1), ("2of2.rank0", 0)]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_tars_hold_the_files_of_a_run(
    tmp_path: Path, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_voc(tmp_path, IDS)
    tar = ["--writer.tar", "2"]
    assert main(words("predict", sd1_folder, "plain")) == 0
    assert main(words("predict", sd1_folder, "tars", *tar)) == 0
    assert tar_masks(tmp_path / "tars") == masks(tmp_path / "plain")
    assert not list((tmp_path / "tars" / "masks").glob("*.png"))
    assert len(list((tmp_path / "tars" / "masks").glob("*.tar"))) == 3
    assert sorted(record["id"] for record in records(tmp_path / "tars")) == sorted(IDS)

    (tmp_path / "tars" / "masks" / "rank0-000001.tar").unlink()
    capsys.readouterr()
    assert main(words("predict", sd1_folder, "tars", "--writer.tar", "1MB")) == 0
    said = capsys.readouterr()
    assert "rank0-000001.tar is missing, which held 2 images" in said.err
    assert said.out.endswith("done 2 / skipped 3 / failed 0 / total 5\n")
    assert tar_masks(tmp_path / "tars") == masks(tmp_path / "plain")
    assert main(words("predict", sd1_folder, "tars")) == 1
    assert "differs in tar" in capsys.readouterr().err


# It leaves closing the tars to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_every_sample_once(tmp_path: Path, sd1_folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_voc(tmp_path, IDS)
    assert main(words("predict", sd1_folder, "tars", "--writer.tar", "2")) == 0
    pattern = str(tmp_path / "tars" / "masks" / "rank0-{000000..000002}.tar")
    dataset = webdataset.WebDataset(pattern, shardshuffle=False).decode("pil")
    samples = {sample["json"]["id"]: sample for sample in dataset}
    assert sorted(samples) == sorted(IDS)
    for image_id, sample in samples.items():
        assert id_of(sample["__key__"]) == image_id
        # Its decoder makes colours of an indexed picture.
        assert sample["png"].size == (sample["json"]["width"], sample["json"]["height"])
    assert sum(1 for _ in dataset) == len(IDS)
    gc.collect()


def kill_after_first_masks(folder: Path, arguments: Sequence[str]) -> None:
    """Kill a run while it fills its second tar."""
    second = folder / "killed" / "masks" / ".rank0-000001.tar.tmp"
    kill_when(lambda: second.exists() and second.stat().st_size > 5_000, folder, arguments)


@pytest.mark.slow
def test_killed_and_resumed_run_holds_the_same_masks(
    tmp_path: Path, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_voc(tmp_path, [f"image{index:03}" for index in range(90)])
    tar = ["--writer.tar", "10"]
    assert main(words("predict", sd1_folder, "whole", "--data.batch_size", "8")) == 0
    kill_after_first_masks(tmp_path, words("predict", sd1_folder, "killed", *tar))
    done = len(tar_masks(tmp_path / "killed"))
    # At least the first tar; more where the machine was busy and the kill came late.
    assert 10 <= done < 90
    unfinished = (tmp_path / "killed" / "masks").glob(".*.tar.tmp")
    left = sum(len(list(whole_samples(path))) for path in unfinished)
    capsys.readouterr()
    assert main(words("predict", sd1_folder, "killed", *tar, "--data.batch_size", "8")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    skipped = int(last.split()[4])
    assert last == f"done {90 - skipped} / skipped {skipped} / failed 0 / total 90"
    assert skipped == done + left  # what the killed run had in its last tar is kept
    assert tar_masks(tmp_path / "killed") == masks(tmp_path / "whole")
    assert not list((tmp_path / "killed" / "masks").glob(".*"))


def test_shards_fill_tars_of_their_own(
    tmp_path: Path, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_voc(tmp_path, IDS)
    tar = ["--writer.tar", "2"]
    assert main(words("predict", sd1_folder, "one")) == 0
    for part in ("2/2", "1/2"):
        assert main(words("predict", sd1_folder, "two", *tar, "--data.shard", part)) == 0
    assert tar_masks(tmp_path / "two") == masks(tmp_path / "one")
    names = sorted(path.name for path in (tmp_path / "two" / "masks").glob("*.tar"))
    assert names == [f"shard{part}-00000{n}.tar" for part, n in SHARDS]
    capsys.readouterr()
    assert main(words("predict", sd1_folder, "two", *tar)) == 0
    assert capsys.readouterr().out.endswith("done 0 / skipped 5 / failed 0 / total 5\n")
