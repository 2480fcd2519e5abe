"""Latents and features on disk: served to whom they belong, whole, and to nobody else."""

import copy
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_process import Counting, fetch_many, images_of
from command_line import masks, words
from diffusers import AutoencoderKL
from fake_voc import write_voc
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from g4seg_pl import feature_cache
from g4seg_pl.core.steps import Correspondence
from g4seg_pl.feature_cache import FeatureCache, check_folder, identity_of
from g4seg_pl.features.open_clip import OpenClipFeatures
from g4seg_pl.features.transformers_clip import TransformersClipFeatures
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab.controls import WithFeatures
from g4seg_pl.main import main
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import ConfigurationError

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
MASK = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)


def refiner_of(model: Path, cache: Path | None, **options: Any) -> G4SegRefiner:
    folder = None if cache is None else str(cache)
    return G4SegRefiner.from_pretrained(
        str(model), device="cpu", cache_features=folder, **({"recipe": "paper"} | options)
    )


def test_cold_and_warm_give_the_same_masks_and_warm_encodes_nothing(
    sd1_folder: Path, tmp_path: Path
) -> None:
    found = []
    for _ in range(2):
        refiner = refiner_of(sd1_folder, tmp_path)
        calls: list[int] = []
        refiner.generator.vae.encoder.conv_in.register_forward_hook(
            lambda _, given, __, calls=calls: calls.append(len(given[0]))
        )
        found.append((refiner.refine(PIXELS, {"dog": MASK, "cat": 1 - MASK}), calls))
    (cold, before), (warm, after) = found
    assert all(np.array_equal(cold[name], warm[name]) for name in cold)
    # Latent, reference features and those of the generated images; then of the latter alone.
    assert (before, after) == ([1, 1, 2], [2])
    plain = refiner_of(sd1_folder, None).refine(PIXELS, {"dog": MASK, "cat": 1 - MASK})
    for name in plain:
        assert np.mean(np.abs(plain[name] - cold[name])) < 1e-3


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    images, network = images_of(), Counting()
    first = FeatureCache(tmp_path, "a").fetch("latents", images[1:2], network)
    every = FeatureCache(tmp_path, "a").fetch("latents", images, network)
    assert network.seen == 1 + 2
    assert torch.equal(every[1:2], first)
    assert torch.equal(every, (images * network.factor).half().float())
    changed = images.clone()
    changed[0, 0, 0, 0] += 1e-3
    for other, name, identity in (
        (changed[:1], "latents", "a"),
        (images[:1, :, :4], "latents", "a"),
        (images[:1], "reference_features", "a"),
        (images[:1], "latents", "b"),
    ):
        network = Counting(0.2)
        FeatureCache(tmp_path, identity).fetch(name, other, network)
        assert network.seen == 1


def test_what_float16_cannot_hold_is_given_as_it_is_and_not_kept(tmp_path: Path) -> None:
    images = images_of(1)
    for _ in range(2):
        network = Counting(1e6)
        found = FeatureCache(tmp_path, "a").fetch("latents", images, network)
        assert torch.equal(found, images * 1e6)
        assert network.seen == 1
    assert not list(tmp_path.iterdir())


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-400] ^= 255
    path.write_bytes(content)


def _of_another(path: Path) -> None:
    np.savez(path, key=np.str_("another"), values=np.zeros((3, 8, 8), np.float16))


def _of_other_type(path: Path) -> None:
    np.savez(path, key=np.str_(path.stem), values=np.zeros((3, 8, 8), np.float32))


def _without_key(path: Path) -> None:
    np.savez(path, values=np.zeros((3, 8, 8), np.float16))


def _bare_array(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.zeros((3, 8, 8), np.float16))


def _pickled(path: Path) -> None:
    np.savez(path, key=np.str_(path.stem), values=np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _empty,
        _flip,
        _of_another,
        _of_other_type,
        _without_key,
        _bare_array,
        _pickled,
    ],
)
def test_damaged_or_foreign_file_is_computed_and_mended(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    images, cache = images_of(1), FeatureCache(tmp_path, "a")
    good = cache.fetch("latents", images, Counting())
    (file,) = tmp_path.rglob("*.npz")
    whole = file.read_bytes()
    damage(file)
    network = Counting()
    assert torch.equal(cache.fetch("latents", images, network), good)
    assert network.seen == 1
    assert file.read_bytes() == whole


def test_identity_is_of_what_encodes(sd1_folder: Path, sd2_folder: Path) -> None:
    def identity(model: Path = sd1_folder, level: int = -1, **options: Any) -> str:
        refiner = refiner_of(model, None, features=VAEFeatures(level), **options)
        return identity_of(refiner.generator.vae, refiner.features)

    mine = identity()
    assert identity() == mine
    assert identity(level=1) != mine
    assert identity(sd2_folder) != mine
    assert identity(dtype="bfloat16") != mine
    refiner = refiner_of(sd1_folder, None)
    vae = refiner.generator.vae
    vae.decoder.conv_out.bias += 1
    assert identity_of(vae, refiner.features) == mine
    vae.encoder.conv_out.bias[0] += 1e-3
    assert identity_of(vae, refiner.features) != mine


class WithHead(VAEFeatures):
    """An extractor with a part that is named as the autoencoder's decoder is."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Linear(1, 1)


def test_identity_is_of_every_part_of_an_extractor(sd1_folder: Path) -> None:
    refiner = refiner_of(sd1_folder, None, features=WithHead())
    mine = identity_of(refiner.generator.vae, refiner.features)
    with torch.no_grad():
        refiner.features.decoder.bias += 1
    assert identity_of(refiner.generator.vae, refiner.features) != mine


def test_identity_of_a_clip_is_of_its_settings_too(
    sd1_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    vae = refiner_of(sd1_folder, None).generator.vae

    def identity(**options: Any) -> str:
        features = OpenClipFeatures(str(clip_folder), **options)
        features.load()
        return identity_of(vae, features)

    mine = identity()
    assert identity() == mine
    assert len({mine, identity(layer=0), identity(projected=False), identity(image_size=48)}) == 4
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    found = set()
    for activation, mean in (("quick_gelu", 0.5), ("gelu", 0.5), ("gelu", 0.4)):
        config.hidden_act = activation
        config.save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [mean] * 3}))
        features = TransformersClipFeatures(str(tmp_path))
        features.load()
        found.add(identity_of(vae, features))
    assert len(found) == 3


class OwnFeatures(VAEFeatures):
    """Somebody's own, which keeps a setting as it likes."""

    def __init__(self, setting: object) -> None:
        super().__init__()
        self._setting = setting


@dataclass(frozen=True)
class Window:
    side: int


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (2, 4),
        ({"cell": 2}, {"cell": 4}),
        (((1, 2), 3), ((1, 4), 3)),
        (torch.float16, torch.bfloat16),
        (torch.tensor([0.5, 0.4]), torch.tensor([0.5, 0.3])),
        ({"b", "a"}, {"b", "c"}),
        (Window(2), Window(4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_another_setting_of_an_own_extractor_is_another_identity(
    sd1_folder: Path, one: object, other: object
) -> None:
    vae = AutoencoderKL.from_pretrained(sd1_folder, subfolder="vae")
    found = {identity_of(vae, OwnFeatures(setting)) for setting in (one, copy.copy(one), other)}
    assert len(found) == 2


def test_the_same_model_in_another_folder_has_the_same_identity(
    sd1_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(sd1_folder / "vae", tmp_path / "copied")
    found = set()
    for folder in (sd1_folder / "vae", tmp_path / "copied"):
        vae, features = AutoencoderKL.from_pretrained(folder), VAEFeatures()
        features.load(vae)
        found.add(identity_of(vae, features))
    assert len(found) == 1


def test_another_extractor_within_a_step_is_not_served_from_it(
    sd1_folder: Path, tmp_path: Path
) -> None:
    steps = [WithFeatures([Correspondence(matching="self")], VAEFeatures(level=0))]
    expected = refiner_of(sd1_folder, None, steps=steps).refine(PIXELS, {"dog": MASK})["dog"]
    refiner_of(sd1_folder, tmp_path).refine(PIXELS, {"dog": MASK})  # fills the folder
    found = refiner_of(sd1_folder, tmp_path, steps=steps).refine(PIXELS, {"dog": MASK})["dog"]
    np.testing.assert_array_equal(found, expected)


def test_another_writer_in_the_midst_of_writing_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, save, others = images_of(1), np.savez, []

    def interrupted(stream: Any, **arrays: Any) -> None:
        stream.write(b"half of ")  # what a reader would meet, were it written in place
        stream.flush()
        if not others:
            others.append(None)
            others[0] = FeatureCache(tmp_path, "a").fetch("latents", images, Counting())
        stream.seek(0)
        save(stream, **arrays)

    monkeypatch.setattr(feature_cache.np, "savez", interrupted)
    found = FeatureCache(tmp_path, "a").fetch("latents", images, Counting())
    assert torch.equal(found, others[0])
    network = Counting()
    assert torch.equal(FeatureCache(tmp_path, "a").fetch("latents", images, network), found)
    assert network.seen == 0
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = images_of()
    kept = FeatureCache(tmp_path, "a").fetch("latents", images[:1], Counting())

    def full(stream: Any, **_: Any) -> None:
        stream.write(b"half of ")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache.np, "savez", full)
    cache, network = FeatureCache(tmp_path, "a"), Counting()
    found = cache.fetch("latents", images, network)
    cache.fetch("latents", images, network)
    assert torch.equal(found, (images * network.factor).half().float())
    assert torch.equal(found[:1], kept)
    assert network.seen == 2 + 2  # what was kept before serves on
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cache_features {tmp_path} cannot be written" in line
    assert "No space left" in line
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".npz"]


@pytest.mark.slow
def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        first, second = pool.map(fetch_many, [str(tmp_path)] * 2)
    assert first == second == fetch_many(str(tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 20
    assert all(path.suffix == ".npz" and not path.name.startswith(".") for path in files)


def test_command_line_keeps_and_reuses_them(
    tmp_path: Path,
    sd1_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    option = ["--model.cache_features", "kept"]
    assert main(words("predict", sd1_folder, "cold", *option)) == 0
    files = sorted(Path("kept").rglob("*.npz"))
    assert len(files) == 2 * 3  # latents and features of three images
    times = [path.stat().st_mtime_ns for path in files]
    assert main(words("predict", sd1_folder, "warm", *option)) == 0
    assert [path.stat().st_mtime_ns for path in files] == times
    assert masks(Path("warm")) == masks(Path("cold"))
    record = json.loads(Path("warm/run.json").read_text())
    assert record["config"]["model"]["init_args"]["cache_features"] is True
    Path("elsewhere").write_text("a file")
    assert main(words("predict", sd1_folder, "out", "--model.cache_features", "elsewhere")) == 1
    assert "cache_features elsewhere cannot be made" in capsys.readouterr().err


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="give a folder to write to"):
        check_folder(str(tmp_path / "file" / "kept"))


def test_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_folder(str(tmp_path / "kept"))
    assert not list((tmp_path / "kept").iterdir())

    def read_only(**options: Any) -> None:
        raise OSError(30, "Read-only file system", str(options["dir"]))

    monkeypatch.setattr(feature_cache, "TemporaryFile", read_only)
    with pytest.raises(ConfigurationError, match=r"cache_features .*kept cannot be written.*Read-"):
        check_folder(str(tmp_path / "kept"))
    (tmp_path / "kept" / "00").mkdir()
    check_folder(str(tmp_path / "kept"))  # what an earlier run kept can be read
