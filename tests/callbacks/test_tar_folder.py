"""Output in tars: the masks of the folder form, in tars of the size asked for."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.npyio import NpzFile
from tar_masks import IDS, die, files, fill, names, refined

from g4seg_pl.callbacks import folder_lock
from g4seg_pl.callbacks.output_folder import OutputFolder
from g4seg_pl.callbacks.resume import finished_by, open_run
from g4seg_pl.callbacks.tar_folder import TarFolder
from g4seg_pl.callbacks.tar_manifest import read_manifest, stored_tars
from g4seg_pl.callbacks.tar_samples import whole_samples
from g4seg_pl.callbacks.tar_writer import TarSize
from g4seg_pl.types import ConfigurationError


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
