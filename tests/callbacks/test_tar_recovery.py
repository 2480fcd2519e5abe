"""Tars after a kill, a cut or a refusal: nothing lost, doubled or half written."""

from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from tar_masks import IDS, die, files, fill, names, refined

from g4seg_pl.callbacks.tar_folder import TarFolder
from g4seg_pl.callbacks.tar_manifest import stored_tars
from g4seg_pl.callbacks.tar_writer import TarSize, finish
from g4seg_pl.segmentation.label_folder import LabelFolder
from g4seg_pl.types import BadItemError, ConfigurationError


def test_killed_run_loses_the_torn_image_alone(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path, size=TarSize(images=5))
    die(fill(folder))
    left = folder.masks / ".rank0-000001.tar.tmp"
    left.write_bytes(left.read_bytes()[:-3])  # within the last record's block
    assert folder.finished() == set(IDS[:-1])
    folder.mend(shard=None)
    assert folder.finished() == set(IDS[:-1])
    assert not left.exists()
    fill(folder, IDS[-1:]).close()
    assert {path.stem for path in folder.masks.glob("*.tar")} == {
        f"rank0-00000{number}" for number in range(3)
    }
    assert len(files(folder.masks)) == 2 * len(IDS)


def test_tar_that_holds_nothing_whole_is_dropped(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path)
    die(fill(folder, IDS[:1]))
    (left,) = folder.masks.iterdir()
    left.write_bytes(left.read_bytes()[:700])
    folder.mend(shard=None)
    assert names(folder) == []


def test_tar_that_another_run_is_filling_is_left_alone(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path)
    sink = fill(folder)
    folder.mend(shard=None)
    assert names(folder) == [".rank0-000000.tar.tmp"]
    sink.save(refined("late"), {"id": "late"})
    sink.close()
    assert folder.finished() == {*IDS, "late"}


def test_tar_that_was_finished_just_now_is_not_finished_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening it and having its lock, its run completes it; another writes it anew."""
    folder = TarFolder(tmp_path)
    sink = fill(folder)
    (left,) = stored_tars(folder.masks)
    whole = left.path.read_bytes()

    def late(file: FileIO) -> bool:
        sink.close()
        left.path.write_bytes(whole[:4000])
        return True

    monkeypatch.setattr("g4seg_pl.callbacks.tar_writer.try_lock", late)
    assert not finish(left, ours=True)
    assert left.target.read_bytes().startswith(whole)
    assert left.path.read_bytes() == whole[:4000]
    assert len(files(folder.masks)) == 2 * len(IDS)


@pytest.mark.parametrize("removed", range(4))
def test_kill_while_a_folder_is_emptied_leaves_nothing_that_looks_lost(
    tmp_path: Path,
    removed: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = TarFolder(tmp_path, size=TarSize(images=4))
    fill(folder).close()
    gone: list[Path] = []
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if len(gone) == removed:
            raise KeyboardInterrupt
        gone.append(path)
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.clear()
    assert len(names(folder)) == 4 - removed
    folder.mend(shard=None)
    assert capsys.readouterr().err == ""


def test_without_locks_only_tars_of_the_same_shard_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: FileIO) -> None:
        return None

    monkeypatch.setattr("g4seg_pl.callbacks.tar_writer.try_lock", no_locks)
    folder = TarFolder(tmp_path)
    for part in ("1of2", "2of2"):
        die(fill(folder, [part], f"shard{part}.rank0"))
    folder.mend(shard="2/2")
    assert len(list(folder.masks.glob("*.tar"))) == 1
    folder.mend(shard=None)
    assert folder.finished() == {"1of2", "2of2"}
    assert len(list(folder.masks.glob("*.tar"))) == 2


def test_kill_between_tar_and_manifest_costs_nothing(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path)
    fill(folder).close()
    manifest = folder.masks / "rank0-000000.jsonl"
    content = manifest.read_bytes()
    manifest.unlink()
    assert folder.finished() == set(IDS)
    folder.mend(shard=None)
    assert manifest.read_bytes() == content


def test_damaged_manifest_is_named(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path)
    fill(folder).close()
    manifest = folder.masks / "rank0-000000.jsonl"
    manifest.write_text(manifest.read_text().replace("png", '"'))
    with pytest.raises(ConfigurationError, match=r"rank0-000000\.jsonl is damaged.*remove it"):
        folder.finished()
    manifest.write_text("{")  # not even a first line: as good as none
    assert folder.finished() == set(IDS)


@pytest.mark.parametrize("cut", [1, 1024, 5000])
def test_tar_cut_short_is_named_and_keeps_what_is_whole(
    tmp_path: Path, cut: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = TarFolder(tmp_path)
    fill(folder).close()
    tar = folder.masks / "rank0-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-cut])
    kept = folder.finished()
    assert len(kept) == len(IDS) if cut <= 1024 else 0 < len(kept) < len(IDS)
    folder.mend(shard=None)
    said = capsys.readouterr().err
    assert "rank0-000000.tar was cut short" in said
    assert f"{len(kept)} images" in said
    assert folder.finished() == kept
    assert len(files(folder.masks)) == 2 * len(kept)
    folder.mend(shard=None)
    assert capsys.readouterr().err == ""


def test_missing_tar_is_named_and_its_images_are_to_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = TarFolder(tmp_path, size=TarSize(images=5))
    fill(folder).close()
    (folder.masks / "rank0-000000.tar").unlink()
    assert folder.finished() == set(IDS[5:])
    folder.mend(shard=None)
    assert "rank0-000000.tar is missing, which held 5 images" in capsys.readouterr().err
    assert names(folder) == ["rank0-000001.jsonl", "rank0-000001.tar"]


def test_second_copies_are_dropped_and_the_first_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = TarFolder(tmp_path, size=TarSize(images=3))
    fill(folder, IDS[:4], "rank0").close()
    before = files(folder.masks)
    fill(folder, IDS[2:6], "rank1").close()  # of a run that went on beside the first
    fill(folder, IDS[:1], "rank2").close()
    with pytest.raises(ConfigurationError, match=r"is there twice.*g4seg predict"):
        LabelFolder(tmp_path)
    folder.mend(shard=None)
    said = capsys.readouterr().err
    assert "rank1-000000.tar: 2 images lie in another tar too" in said
    assert "rank2-000000.tar: 1 images lie in another tar too" in said
    assert before.items() <= files(folder.masks).items()  # each is there once
    assert folder.finished() == set(IDS[:6])
    assert [tar.state for tar in stored_tars(folder.masks)] == ["whole"] * 4
    LabelFolder(tmp_path)
    folder.mend(shard=None)
    assert capsys.readouterr().err == ""


def test_forgotten_images_leave_their_tars(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path, size=TarSize(images=3))
    fill(folder).close()
    before = files(folder.masks)
    folder.forget({*IDS[:3], IDS[4]})
    left = {name.partition(".")[0].replace("%2E", ".") for name in files(folder.masks)}
    assert left == folder.finished() == {IDS[3], IDS[5], IDS[6]}
    assert files(folder.masks).items() <= before.items()
    assert [tar.state for tar in stored_tars(folder.masks)] == ["whole"] * 2


def test_kill_while_a_tar_is_written_anew_leaves_the_old_one(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path)
    fill(folder).close()
    (folder.masks / "rank0-000000.jsonl").unlink()
    half = folder.masks / ".rank0-000000.tar.tmp"
    half.write_bytes((folder.masks / "rank0-000000.tar").read_bytes()[:4000])
    assert folder.finished() == set(IDS)
    folder.mend(shard=None)
    assert not half.exists()
    assert len(files(folder.masks)) == 2 * len(IDS)


def test_nothing_of_a_sample_that_the_disk_refused_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = TarFolder(tmp_path)
    sink = fill(folder, IDS[:2])

    class Full(FileIO):
        def write(self, content: Any, /) -> int:
            super().write(content[:100])
            raise OSError(28, "No space left on device")

    whole = sink.writer._file  # type: ignore[attr-defined]
    full = Full(whole.name, "r+b")
    monkeypatch.setattr(sink.writer, "_file", full)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="No space"):
        sink.save(refined(IDS[2]), {"id": IDS[2]})
    monkeypatch.setattr(sink.writer, "_file", whole)  # type: ignore[attr-defined]
    full.close()
    sink.save(refined(IDS[3]), {"id": IDS[3]})
    sink.close()
    assert folder.finished() == {*IDS[:2], IDS[3]}
    assert len(files(folder.masks)) == 6


def test_id_that_leads_out_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path)
    with pytest.raises(BadItemError, match="plain file name"):
        fill(folder, ["../a"])
