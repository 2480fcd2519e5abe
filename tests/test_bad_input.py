"""Bad items through the command line: each fails by name with a remedy, and the run goes on."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from command_line import masks, records, words
from fake_voc import write_voc
from PIL import Image

from g4seg_pl.main import main

SIZE = (40, 52)
ROTATED = 6  # EXIF: turn a quarter clockwise to view
EXIF_ORIENTATION = 0x0112

# What each bad item's error must say beside its name.
FAILURES = {
    "no_image": "no such file",
    "cut_image": "truncated or not a picture",
    "text_image": "truncated or not a picture",
    "no_seed": "no seed file",
    "cut_seed": "cut_seed.npy",
    "other_size": "the seed is 7x9, the image 40x52",
    "turned": "set orientation to exif",
    "nan": "NaN",
    "too_large": "scores range from 0 to 2, not 0 to 1",
    "negative": "scores range from -0.5 to 1, not 0 to 1",
    "no_class": "has no class",
    "unknown": "[78] are outside 1 to 20",
    "all_zero": "empty (nowhere above 0)",
    "../escape": "not a plain file name",
}
PICTURES = ("grey", "rgba", "cmyk", "sixteen", "rotated")


def write_seed(folder: Path, name: str, maps: np.ndarray, keys: tuple[int, ...] = (11,)) -> None:
    """A CLIP-ES seed file; key 11 is the dog."""
    content = {"keys": np.array(keys, dtype=np.int64), "attn_highres": maps}
    np.save(folder / f"{name}.npy", content, allow_pickle=True)


def full(value: float, size: tuple[int, int] = SIZE) -> np.ndarray:
    """One map of one value, but for its first row."""
    maps = np.full((1, *size), value, np.float32)
    maps[:, 0] = 0
    return maps


def cut(path: Path, size: int) -> None:
    """Leave the beginning of a file."""
    path.write_bytes(path.read_bytes()[:size])


def write_bad(images: Path, seeds: Path) -> None:
    """Spoil the items of FAILURES, which lie there in good order."""
    rotated(images / "turned.jpg")
    write_seed(seeds, "turned", full(0.5, SIZE[::-1]))
    (images / "no_image.jpg").unlink()
    cut(images / "cut_image.jpg", 200)
    (images / "text_image.jpg").write_text("not a picture")
    (seeds / "no_seed.npy").unlink()
    cut(seeds / "cut_seed.npy", 60)
    write_seed(seeds, "other_size", full(0.5, (7, 9)))
    write_seed(seeds, "nan", full(np.nan))
    write_seed(seeds, "too_large", full(2))
    write_seed(seeds, "negative", full(-0.5) + (np.arange(52) > 9))
    write_seed(seeds, "no_class", np.zeros((0, *SIZE), np.float32), keys=())
    write_seed(seeds, "unknown", full(0.5), keys=(77,))
    write_seed(seeds, "all_zero", full(0))


def rotated(path: Path) -> None:
    """A picture with a note in EXIF that it is to be turned."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = ROTATED
    Image.fromarray(pixels()).save(path, exif=exif)


def pixels() -> np.ndarray:
    """A picture of noise."""
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def write_odd_pictures(images: Path) -> None:
    """PICTURES: of kinds that are not 8-bit RGB, and can be read all the same."""
    picture = Image.fromarray(pixels())
    sixteen = Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257)
    saving: dict[str, Callable[[Path], None]] = {
        "grey.jpg": picture.convert("L").save,
        "rgba.png": picture.convert("RGBA").save,
        "cmyk.jpg": picture.convert("CMYK").save,
        "sixteen.png": sixteen.save,
        "rotated.jpg": rotated,
    }
    for name, save in saving.items():
        (images / f"{Path(name).stem}.jpg").unlink()
        save(images / name)


@dataclass(frozen=True)
class Outcome:
    """A run over a tree with bad items: exit status, what it printed, its folder."""

    status: int
    said: str
    complained: str
    out: Path


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path) -> Outcome:
    root = tmp_path_factory.mktemp("bad")
    ids = [*(name for name in FAILURES if name != "../escape"), *PICTURES, "good"]
    voc = write_voc(root, ids)
    for name in ids:  # of one size and one class all
        Image.fromarray(pixels()).save(voc / "JPEGImages" / f"{name}.jpg")
        write_seed(root / "cam_out", name, full(0.5))
    write_bad(voc / "JPEGImages", root / "cam_out")
    write_odd_pictures(voc / "JPEGImages")
    with (voc / "ImageSets" / "Segmentation" / "train.txt").open("a") as file:
        file.write("../escape\n")
    return run(root, sd1_folder)


def run(root: Path, model: Path) -> Outcome:
    """Predict in a folder."""
    said, complained = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        with redirect_stdout(said), redirect_stderr(complained):
            status = main(words("predict", model, "out"))
    return Outcome(status, said.getvalue(), complained.getvalue(), root / "out")


@pytest.mark.parametrize("name", FAILURES)
def test_bad_item_fails_by_name_with_a_remedy(outcome: Outcome, name: str) -> None:
    (record,) = [record for record in records(outcome.out) if record["id"] == name]
    assert record["status"] == "failed"
    assert FAILURES[name] in record["error"]
    assert Path(name).name in record["error"]
    problem, _, remedy = record["error"].rpartition(". ")
    assert problem
    assert remedy
    assert f"failed {name}: {record['error']}" in outcome.complained


@pytest.mark.parametrize("name", [*PICTURES, "good"])
def test_picture_of_any_kind_is_refined(outcome: Outcome, name: str) -> None:
    (record,) = [record for record in records(outcome.out) if record["id"] == name]
    assert record["status"] == "done"
    assert (record["height"], record["width"]) == SIZE


def test_run_goes_on_and_ends_with_an_error_status(outcome: Outcome) -> None:
    assert outcome.status == 1
    assert set(masks(outcome.out)) == {f"{name}.png" for name in (*PICTURES, "good")}
    assert outcome.said.splitlines()[-1] == "done 6 / skipped 0 / failed 14 / total 20"
    assert "Traceback" not in outcome.complained
