"""What is missing, damaged or hostile in tars and at addresses: named, and nothing executed."""

import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
from stored_trees import module, samples_of, store, write_tar

from datamodules import VOCDataModule
from g4seg_pl.types import ConfigurationError, FailedSample, Sample


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
