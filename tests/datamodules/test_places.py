"""Images and seeds in tars and at addresses: the same samples as from local folders."""

import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stored_trees import FORMS, SIZES, add, assert_same, module, samples_of, store, write_tar

from datamodules import VOCDataModule, check, places
from datamodules.addresses import expand
from datamodules.archives import TarArchive
from datamodules.classes import read_class_list
from datamodules.seed_files import open_seeds, write_seed
from datamodules.seed_files.writing import WRITABLE, suffix
from g4seg_pl.types import FailedSample, Sample


@pytest.mark.parametrize("seeds", FORMS)
@pytest.mark.parametrize("images", FORMS)
def test_any_mixture_gives_the_samples_of_folders(
    tree: Path, bucket: str, images: str, seeds: str
) -> None:
    expected = samples_of(module(tree / "images", tree / "seeds"))
    assert set(expected) == set(SIZES)
    root, masks = store(tree / "images", images, bucket), store(tree / "seeds", seeds, bucket)
    assert_same(samples_of(module(root, masks)), expected)


@pytest.mark.parametrize("form", FORMS[1:])
def test_truth_and_list_files_too(tree: Path, bucket: str, form: str) -> None:
    listed = tree / "list.txt"
    listed.write_text("c_2\na.jpg\n")
    places = [tree / name for name in ("images", "seeds", "truth")]
    local = module(places[0], places[1], truth=places[2], split=str(listed))
    root, seeds, truth = (store(place, form, bucket) for place in places)
    data = module(root, seeds, truth=truth, split=str(listed))
    expected = samples_of(local, test=True)
    assert list(expected) == ["c_2", "a"]
    assert all(
        isinstance(sample, Sample) and sample.truth is not None for sample in expected.values()
    )
    assert_same(samples_of(data, test=True), expected)
    report = check.inspect(data, truth=True)
    assert replace(report, complaints={}) == check.inspect(local, truth=True)
    assert (report.with_truth, report.complaints) == (2, {})


@pytest.mark.parametrize("form", ["address", "tars"])
def test_workers_and_shards(
    tree: Path, bucket: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})  # two workers are meant
    root, seeds = (store(tree / name, form, bucket) for name in ("images", "seeds"))
    expected = samples_of(module(root, seeds))  # what this process opens is not the workers'
    assert_same(samples_of(module(root, seeds, num_workers=2, batch_size=1)), expected)
    halves = [samples_of(module(root, seeds, shard=f"{index}/2")) for index in (1, 2)]
    assert halves[0].keys().isdisjoint(halves[1])
    assert_same(halves[0] | halves[1], expected)


@pytest.mark.parametrize("form", FORMS)
def test_data_set_can_be_pickled(tree: Path, bucket: str, form: str) -> None:
    data = module(*(store(tree / name, form, bucket) for name in ("images", "seeds")))
    data.setup()
    dataset = data.predict_dataloader().dataset
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[2].image, dataset[2].image)


@pytest.mark.parametrize("dialect", WRITABLE)
@pytest.mark.parametrize("form", ["address", "tar"])
def test_every_dialect_reads_from_bytes(
    tmp_path: Path, bucket: str, dialect: Any, form: str
) -> None:
    size, classes = (8, 12), read_class_list("voc")
    maps = np.zeros((2, *size), np.float32)
    maps[0, :, :6], maps[1, :, 6:] = 0.95, 1.0
    maps[1, 0, 0] = 0.01
    path = tmp_path / "seeds" / f"a{suffix(dialect)}"
    write_seed(path, (3, 15), maps, dialect, classes=len(classes), background=0.5)
    seeds = open_seeds(store(tmp_path / "seeds", form, bucket), classes)
    expected = open_seeds(tmp_path / "seeds", classes)
    assert seeds.dialect_of("a") == expected.dialect_of("a") == dialect
    assert seeds.names() == expected.names() == ["a"]
    found, local = (each.read("a", size, None) for each in (seeds, expected))
    assert found.class_ids == local.class_ids == (3, 15)
    assert torch.equal(found.scores, local.scores)


def test_one_tar_of_pictures_seeds_and_truth(tree: Path) -> None:
    """As WebDataset has it: `a.jpg`, `a.npy`, `a.png` are one sample."""
    for file in (tree / "images").glob("*.PNG"):
        Image.open(file).save(tree / "images" / f"{file.stem}.jpg")
        file.unlink()
    files = [file for name in ("images", "seeds", "truth") for file in (tree / name).iterdir()]
    together = write_tar(tree / "all.tar", files)
    expected = samples_of(module(tree / "images", tree / "seeds"))
    assert_same(samples_of(module(together, together, dialect="clip_es")), expected)
    ambiguous = samples_of(module(together, together))["a"]
    assert isinstance(ambiguous, FailedSample)
    assert ambiguous.error.endswith("or set dialect to that of the one that is meant")
    assert "all.tar [a]: several seeds: a.npy, a.png" in ambiguous.error


def test_keys_end_at_the_first_dot_and_extensions_count_whole(
    tmp_path: Path, save_image: Callable[..., Path], save_seed: Callable[..., Path]
) -> None:
    picture, seed = save_image(tmp_path / "x.png"), save_seed(tmp_path / "x.npy", [3])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("v/1.png", "v/1.label.png", "v/._1.png", "v/1.json"):
            add(tar, name, picture.read_bytes())
        add(tar, "w/1.npy", seed.read_bytes())
    data = module(tmp_path / "a.tar", tmp_path / "a.tar", dialect="clip_es")
    assert list(samples_of(data)) == ["1"]
    assert str(data.items[0].image).endswith("a.tar [v/1.png]")


def test_each_place_is_listed_once(
    tree: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, seeds = store(tree / "images", "address", bucket), store(tree / "seeds", "tars", bucket)
    listings: list[str] = []
    plain_names, plain_scan = places.RemoteFolder._names, TarArchive.names
    monkeypatch.setattr(
        places.RemoteFolder,
        "_names",
        lambda self: listings.append("folder") or plain_names(self),  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(
        TarArchive,
        "names",
        lambda self: listings.append(self.url) or plain_scan(self),  # type: ignore[func-returns-value]
    )
    data = module(root, seeds, truth=seeds)
    data.setup()
    samples_of(data)
    data.list_items()
    assert len(listings) == len(set(listings)) == 1 + 3


def test_seeds_of_the_other_data_sets_may_be_elsewhere(voc: Path, bucket: str) -> None:
    local = VOCDataModule(voc, voc.parent.parent / "cam_out", split="train", num_workers=0)
    seeds = store(voc.parent.parent / "cam_out", "tars", bucket)
    data = VOCDataModule(voc, seeds, split="train", num_workers=0)
    assert_same(samples_of(data), samples_of(local))  # type: ignore[arg-type]


def test_more_tars_than_a_process_may_open(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.archives.MOST_OPEN", 2)
    files = sorted((tree / "seeds").iterdir())
    for index, file in enumerate(files):
        write_tar(tree / f"s-{index}.tar", [file])
    seeds = open_seeds(tree / "s-{0..3}.tar", read_class_list("voc"))
    expected = open_seeds(tree / "seeds", read_class_list("voc"))

    def opened() -> int:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
        files = [Path(os.readlink(link)) for link in links if os.path.islink(link)]  # noqa: PTH114, PTH115
        # An archive of another test may not have been collected yet.
        return sum(file.parent == tree.resolve() and file.suffix == ".tar" for file in files)

    for _ in range(2):
        for name, size in SIZES.items():
            found = seeds.read(name, size, None)
            assert torch.equal(found.scores, expected.read(name, size, None).scores)
            assert opened() <= 2
    del seeds
    assert opened() == 0


def test_patterns(tmp_path: Path) -> None:
    assert expand("s3://b/i-{008..011}.tar") == [
        f"s3://b/i-{n}.tar" for n in ("008", "009", "010", "011")
    ]
    assert expand("{a,b}-{0..1}.tar") == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]
    assert expand("https://h/a.tar?key=1") == ["https://h/a.tar?key=1"]
    for name in ("x2.tar", "x1.tar", "y.tar", "z[1].tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/x?.tar") == [f"{tmp_path}/x1.tar", f"{tmp_path}/x2.tar"]
    assert expand(f"{tmp_path}/z[1].tar") == [f"{tmp_path}/z[1].tar"]


def test_glob_behind_a_cache_keeps_the_cache(tree: Path, bucket: str) -> None:
    seeds = store(tree / "seeds", "remote tars", bucket)
    found = open_seeds(f"simplecache::{seeds}", read_class_list("voc"))
    expected = open_seeds(tree / "seeds", read_class_list("voc"))
    assert found.names() == expected.names()
    assert "simplecache::memory://" in str(found.path("a"))  # type: ignore[attr-defined]
    assert torch.equal(
        found.read("a", SIZES["a"], None).scores, expected.read("a", SIZES["a"], None).scores
    )
