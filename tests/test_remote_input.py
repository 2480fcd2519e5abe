"""The command line on tars and addresses: the masks of local folders, and bad items by name."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from command_line import REPOSITORY, masks, records
from fake_voc import IDS, write_voc

from g4seg_pl.main import main

CONFIG = REPOSITORY / "configs" / "refine" / "folder.yaml"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three images in `images`, their seeds in `seeds`."""
    voc = write_voc(tmp_path)
    (voc / "JPEGImages").rename(tmp_path / "images")
    (tmp_path / "cam_out").rename(tmp_path / "seeds")
    return tmp_path


@pytest.fixture
def bucket(tree: Path) -> Iterator[str]:
    """The images at an address."""
    system = fsspec.filesystem("memory")
    for path in (tree / "images").iterdir():
        system.pipe_file(f"/bucket/images/{path.name}", path.read_bytes())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def predict(model: Path, root: str | Path, seeds: str | Path, out: Path) -> int:
    given = ["predict", "-c", str(CONFIG), "--data.root", str(root), "--data.seeds", str(seeds)]
    given += ["--data.class_names", "voc", "--data.num_workers", "0", "--model.model", str(model)]
    return main([*given, "--trainer.accelerator", "cpu", "--out", str(out)])


def write_tars(tree: Path, name: str) -> str:
    """Two tars of a folder; returns their pattern."""
    for index in range(2):
        with tarfile.open(tree / f"{name}-{index}.tar", "w") as tar:
            for path in sorted((tree / name).iterdir())[index::2]:
                tar.add(path, path.name)
    return str(tree / f"{name}-{{0..1}}.tar")


def test_masks_are_those_of_folders(tree: Path, bucket: str, sd1_folder: Path) -> None:
    assert predict(sd1_folder, tree / "images", tree / "seeds", tree / "local") == 0
    expected = masks(tree / "local")
    assert set(expected) == {f"{name}.png" for name in IDS}
    assert predict(sd1_folder, f"{bucket}/images", write_tars(tree, "seeds"), tree / "mixed") == 0
    assert masks(tree / "mixed") == expected


def test_bad_items_are_named_and_the_run_goes_on(
    tree: Path, bucket: str, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = IDS
    system = fsspec.filesystem("memory")
    system.pipe_file(f"/bucket/images/{first}.jpg", b"no picture")
    (tree / "seeds" / f"{third}.npy").unlink()
    seeds = write_tars(tree, "seeds")
    assert predict(sd1_folder, f"{bucket}/images", seeds, tree / "out") == 1
    found = {record["id"]: record for record in records(tree / "out")}
    assert found[second]["status"] == "done"
    assert f"memory://bucket/images/{first}.jpg: truncated or not" in found[first]["error"]
    assert f"seeds-{{0..1}}.tar [{third}]: no seed file" in found[third]["error"]
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "done 1 / skipped 0 / failed 2 / total 3"
    assert found[first]["error"] in said.err


def test_missing_place_is_said_in_one_line(
    tree: Path, bucket: str, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(sd1_folder, f"{bucket}/none", tree / "seeds", tree / "out") != 0
    said = capsys.readouterr().err
    assert f"root: {bucket}/none: no such folder. Check the address" in said
    assert "Traceback" not in said
