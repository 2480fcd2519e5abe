"""Output in tars: the masks of the folder form, and nothing lost, doubled or half written."""

import io
import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.npyio import NpzFile

from g4seg_pl.callbacks import folder_lock
from g4seg_pl.callbacks.output_folder import MaskSink, OutputFolder
from g4seg_pl.callbacks.resume import finished_by, open_run
from g4seg_pl.callbacks.tar_folder import TarFolder
from g4seg_pl.callbacks.tar_manifest import read_manifest, stored_tars
from g4seg_pl.callbacks.tar_samples import whole_samples
from g4seg_pl.callbacks.tar_writer import TarSize
from g4seg_pl.types import BadItemError, ConfigurationError, RefinedMask

IDS = [f"{index}.b" for index in range(7)]


def refined(image_id: str) -> RefinedMask:
    generator = torch.Generator().manual_seed(len(image_id) + ord(image_id[0]))
    label = torch.randint(0, 3, (9, 13), generator=generator).byte()
    return RefinedMask(image_id, (1, 2), torch.rand(2, 9, 13, generator=generator), label)


def fill(folder: TarFolder, ids: Sequence[str] = IDS, process: str = "rank0") -> MaskSink:
    """Write masks and leave the last tar unfinished."""
    folder.make()
    sink = folder.sink(process)
    for image_id in ids:
        sink.save(refined(image_id), {"id": image_id, "height": 9})
    return sink


def files(folder: Path) -> dict[str, bytes]:
    """Every member of every tar of a folder by name, each once."""
    found: dict[str, bytes] = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                assert member.name not in found
                found[member.name] = stream.read()
    return found


def names(folder: OutputFolder) -> list[str]:
    return sorted(path.name for path in folder.masks.iterdir())


def die(sink: Any) -> None:
    """Let go of the open tar as the system does when a process is killed."""
    sink.writer._file.close()


@pytest.mark.parametrize("soft", ["none", "npz", "clip_es", "irn"])
def test_files_are_those_of_the_folder_form(tmp_path: Path, soft: Any) -> None:
    plain, tars = OutputFolder(tmp_path / "plain", soft), TarFolder(tmp_path / "tars", soft)
    plain.make()
    for image_id in IDS:
        plain.save(refined(image_id))
    fill(tars).close()
    found = files(tars.masks)
    for image_id in IDS:
        key = image_id.replace(".", "%2E")
        assert found.pop(f"{key}.png") == plain.mask_path(image_id).read_bytes()
        assert json.loads(found.pop(f"{key}.json")) == {"id": image_id, "height": 9}
        if soft != "none":
            path = plain.soft_path(image_id)
            # Not the bytes: zip files and pickled tensors hold times and counters.
            same_arrays(io.BytesIO(found.pop(f"{key}{path.suffix}")), path)
    assert found == {}


def same_arrays(*sources: Any) -> None:
    """Both hold the same arrays under the same names."""
    ours, theirs = (np.load(source, allow_pickle=True) for source in sources)
    ours, theirs = (each if isinstance(each, NpzFile) else each.item() for each in (ours, theirs))
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_full_tars_get_their_names_at_once(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path, size=TarSize(images=3))
    sink = fill(folder)
    whole = [f"rank0-00000{number}{suffix}" for number in (0, 1) for suffix in (".jsonl", ".tar")]
    assert names(folder) == [".rank0-000002.tar.tmp", *whole]
    assert folder.finished() == set(IDS)
    sink.close()
    assert len(names(folder)) == 6
    for tar in stored_tars(folder.masks):
        assert tar.state == "whole"
        manifest = read_manifest(tar.manifest)
        assert manifest is not None
        assert manifest.size == tar.path.stat().st_size
        assert manifest.samples() == tuple(whole_samples(tar.path))
        assert tar.ids == [sample.image_id for sample in tar.samples]


def test_tars_stay_within_their_bytes(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path, "npz", TarSize(bytes=16_000))
    fill(folder).close()
    sizes = [path.stat().st_size for path in folder.masks.glob("*.tar")]
    assert len(sizes) > 1
    assert 8_000 < max(sizes) <= 16_000
    large = TarFolder(tmp_path / "large", size=TarSize(bytes=10))  # an image a tar, then
    fill(large).close()
    assert len(list(large.masks.glob("*.tar"))) == len(IDS)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1000, TarSize(images=1000)),
        ("20", TarSize(images=20)),
        ("256MB", TarSize(bytes=256_000_000)),
        ("1.5 GiB", TarSize(bytes=3 * 2**29)),
        ("900B", TarSize(bytes=900)),
    ],
)
def test_sizes_are_images_or_bytes(text: int | str, size: TarSize) -> None:
    assert TarSize.parse(text) == size


@pytest.mark.parametrize("text", [0, -5, "0MB", "2.5", "many", "10 images", "1TB"])
def test_other_sizes_are_refused(text: int | str) -> None:
    with pytest.raises(ConfigurationError, match=r"writer\.tar is .*such as 1000"):
        TarSize.parse(text)


def test_threads_share_a_sink(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path, size=TarSize(images=7))
    folder.make()
    sink, ids = folder.sink("rank0"), [f"image{number}" for number in range(100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda each: sink.save(refined(each), {"id": each}), ids))
    sink.close()
    assert len(list(folder.masks.glob("*.tar"))) == 15
    assert {name.partition(".")[0] for name in files(folder.masks)} == set(ids)


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


def start(folder: OutputFolder, seed: int, *, override: bool = False) -> frozenset[str]:
    """Begin a run over `IDS`, as the writer does; returns what it skips."""
    tars = {"tar": True} if isinstance(folder, TarFolder) else {}
    config = {"model": {"seed": seed}, **tars}
    skipped = frozenset() if override else finished_by(folder, config, IDS)
    folder.make()
    open_run(folder, config, IDS, object(), object(), override=override)
    return skipped


def test_the_two_forms_do_not_mix(tmp_path: Path) -> None:
    plain, tars = OutputFolder(tmp_path), TarFolder(tmp_path)
    start(tars, 0)
    die(fill(tars))  # an unfinished tar stands in the way too
    with pytest.raises(ConfigurationError, match="differs in tar"):
        start(plain, 0)
    start(plain, 0, override=True)
    assert names(plain) == []
    plain.save(refined("a"))
    with pytest.raises(ConfigurationError, match="differs in tar"):
        start(tars, 0)
    start(tars, 0, override=True)
    assert names(tars) == []


def test_override_redoes_what_is_asked_for(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path)
    start(folder, 0)
    fill(folder, [*IDS, "other"]).close()
    assert start(folder, 0) == set(IDS)
    start(folder, 0, override=True)
    assert folder.finished() == {"other"}
    start(folder, 1, override=True)
    assert folder.finished() == set()


def test_tars_of_others_are_not_touched(tmp_path: Path) -> None:
    folder = TarFolder(tmp_path)
    folder.make()
    for name in ("images.tar", "notes.jsonl", ".images.tar.tmp"):
        (folder.masks / name).write_bytes(b"somebody's")
    folder.mend(shard=None)
    folder.clear()
    assert not folder.holds_masks()
    assert len(names(folder)) == 3


def test_lock_is_that_of_the_open_file(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w") as first, (tmp_path / "x").open("a") as second:
        assert folder_lock.try_lock(first)
        assert folder_lock.try_lock(second) is False
    with (tmp_path / "x").open("a") as third:
        assert folder_lock.try_lock(third)
