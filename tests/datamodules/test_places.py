"""Images and seeds in tars and at addresses: the same samples as from local folders."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import FolderDataModule, VOCDataModule, check, places
from datamodules.addresses import expand
from datamodules.archives import TarArchive
from datamodules.classes import read_class_list
from datamodules.seed_files import open_seeds, write_seed
from datamodules.seed_files.writing import WRITABLE, suffix
from g4seg_pl.types import ConfigurationError, FailedSample, Sample

SIZES = {"a": (12, 17), "b": (9, 20), "c_2": (15, 15), "d": (8, 8)}
FORMS = ("folder", "address", "tar", "tars", "remote tars")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_tar(path: Path, files: Sequence[Path], folder: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        for file in files:
            add(tar, f"{folder}{file.name}", file.read_bytes())
    return path


@pytest.fixture
def bucket() -> Iterator[str]:
    """An empty folder in memory."""
    system = fsspec.filesystem("memory")
    system.makedirs("/bucket", exist_ok=True)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def upload(file: Path, address: str) -> None:
    with fsspec.open(f"{address}/{file.name}", "wb") as target:
        target.write(file.read_bytes())


@pytest.fixture
def tree(
    tmp_path: Path,
    save_image: Callable[..., Path],
    save_seed: Callable[..., Path],
) -> Path:
    """Images of several kinds, seeds and truth in local folders."""
    (tmp_path / "truth").mkdir()
    for index, (name, size) in enumerate(SIZES.items()):
        save_image(tmp_path / "images" / f"{name}{('.jpg', '.PNG')[index % 2]}", size)
        save_seed(tmp_path / "seeds" / f"{name}.npy", [3, 15][: 1 + index % 2], size)
        Image.new("L", size[::-1], 3 * index).save(tmp_path / "truth" / f"{name}.png")
    (tmp_path / "images" / "notes.txt").write_text("no picture")
    return tmp_path


def store(folder: Path, form: str, bucket: str) -> str:
    """The files of a local folder in another form; what to give to the DataModule."""
    files = sorted(folder.iterdir())
    match form:
        case "folder":
            return str(folder)
        case "address":
            for file in files:
                upload(file, f"{bucket}/{folder.name}")
            return f"{bucket}/{folder.name}/"
        case "tar":
            return str(write_tar(folder.with_suffix(".tar"), files, "./deep/er/"))
    parts = [
        write_tar(folder.parent / f"{folder.name}-{index:03d}.tar", files[index::3])
        for index in range(3)
    ]
    if form == "tars":
        return str(folder.parent / f"{folder.name}-{{000..002}}.tar")
    for part in parts:
        upload(part, bucket)
    return f"{bucket}/{folder.name}-*.tar"


def samples_of(data: FolderDataModule, **options: Any) -> dict[str, Sample | FailedSample]:
    data.setup()
    loader = data.test_dataloader() if options else data.predict_dataloader()
    return {sample.image_id: sample for batch in loader for sample in batch}


def module(root: str | Path, seeds: str | Path, **options: Any) -> FolderDataModule:
    return FolderDataModule(root, seeds, "voc", **({"num_workers": 0} | options))


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, sample in expected.items():
        other = found[name]
        assert isinstance(other, Sample), other
        assert torch.equal(other.image, sample.image)
        assert torch.equal(other.seed.scores, sample.seed.scores)
        assert other.seed.class_ids == sample.seed.class_ids
        if sample.truth is not None:
            assert torch.equal(other.truth, sample.truth)


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


def test_nothing_is_read_before_an_image_is_due(tree: Path, bucket: str) -> None:
    root, seeds = (store(tree / name, "address", bucket) for name in ("images", "seeds"))
    data = module(root, seeds)
    data.setup()
    fsspec.filesystem("memory").rm("/bucket/seeds/b.npy")
    found = samples_of(data)
    assert isinstance(found["b"], FailedSample)
    assert found["b"].error == "memory://bucket/seeds/b.npy: no such file. Check the id"
    assert all(isinstance(found[name], Sample) for name in ("a", "c_2", "d"))


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["address", "tar"])
def test_bad_items_fail_by_name_and_execute_nothing(tree: Path, bucket: str, form: str) -> None:
    mark = tree / "executed"
    (tree / "images" / "a.jpg").write_bytes((tree / "images" / "a.jpg").read_bytes()[:200])
    np.save(tree / "seeds" / "b.npy", {"keys": Hostile(mark)}, allow_pickle=True)  # type: ignore[arg-type]
    (tree / "seeds" / "c_2.npy").write_bytes(b"")
    (tree / "seeds" / "d.npy").unlink()
    np.savez(tree / "seeds" / "d.npz", wrong=np.array({"x": Hostile(mark)}))
    local = samples_of(module(tree / "images", tree / "seeds"))
    root, seeds = (store(tree / name, form, bucket) for name in ("images", "seeds"))
    found = samples_of(module(root, seeds))
    assert not mark.exists()
    names = {"a": "a.jpg", "b": "b.npy", "c_2": "c_2.npy", "d": "d.npz"}
    for name, file in names.items():
        sample, expected = found[name], local[name]
        assert isinstance(sample, FailedSample)
        assert isinstance(expected, FailedSample)
        where = root if name == "a" else seeds
        address = f"{where}{file}" if form == "address" else f"{where} [./deep/er/{file}]"
        assert sample.error.startswith(address)
        # What the reader says beside the place is what it says of a local file.
        said = expected.error.partition(file)[2].partition(":")[2].partition("BytesIO")[0]
        assert said[:30] in sample.error


def test_missing_files_fail_by_name(tree: Path) -> None:
    seeds = write_tar(tree / "s.tar", [tree / "seeds" / "a.npy"])
    root = write_tar(tree / "i.tar", sorted((tree / "images").iterdir()))
    listed = tree / "list.txt"
    listed.write_text("a\nb\nnone\nsub/other.jpg\n")
    found = samples_of(module(root, seeds, split=str(listed)))
    assert isinstance(found["a"], Sample)
    assert f"{seeds} [b]: no seed file" in found["b"].error  # type: ignore[union-attr]
    assert f"{root} [none.jpg]: no such file" in found["none"].error  # type: ignore[union-attr]
    assert f"{root} [sub/other.jpg]: no such" in found["other"].error  # type: ignore[union-attr]


def test_what_cannot_be_opened_is_said_before_the_run(tree: Path, bucket: str) -> None:
    seeds, cut = tree / "seeds", tree / "cut.tar"
    cut.write_bytes(
        write_tar(tree / "i.tar", sorted((tree / "images").iterdir())).read_bytes()[:900]
    )
    twice = write_tar(tree / "twice-1.tar", [tree / "images" / "a.jpg"])
    write_tar(tree / "twice-2.tar", [tree / "images" / "a.jpg"])
    (tree / "images.tar.gz").write_bytes(b"\x1f\x8b")
    said = {
        f"{bucket}/none": r"root: memory://bucket/none: no such folder\. Check",
        f"{bucket}/none.tar": r"root: memory://bucket/none\.tar: no such tar",
        f"{bucket}/none-*.tar": r"root: no tar is called memory://bucket/none-\*\.tar",
        str(tree / "none"): r"root: no folder .*none",
        str(tree / "i-{000..002}.tar"): r"i-000\.tar: no such tar",
        str(tree / "i-{002..000}.tar"): r"stands for 0 files.*counts up",
        str(tree / "i-{0..9999999}.tar"): r"stands for \d+ files",
        str(cut): r"root: .*cut\.tar: cut short.*again",
        str(tree / "images.tar.gz"): r"images\.tar\.gz is compressed.*Decompress",
        str(twice).replace("1", "*"): r"image a is there twice, as .*1\.tar.* and .*2\.tar",
    }
    for root, message in said.items():
        with pytest.raises(ConfigurationError, match=message):
            module(root, seeds).setup()
    with pytest.raises(ConfigurationError, match=r"seeds: memory://bucket/x\.json.*Copy it here"):
        module(tree / "images", f"{bucket}/x.json").setup()
    with pytest.raises(ConfigurationError, match=r"FolderDataModule"):
        VOCDataModule(bucket, seeds).setup()


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
        return sum(os.readlink(link).endswith(".tar") for link in links if os.path.islink(link))  # noqa: PTH114, PTH115

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
