"""Every file in configs/seeds makes its maker, and one runs from the command line."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from fake_voc import CLASSES, IDS, SIZES, write_voc
from jsonargparse import ArgumentParser

import datamodules
from datamodules.seed_files.source import open_seeds
from g4seg_pl.main import main
from g4seg_pl.seeds.base import SeedMaker

# LightningCLI 2.6 calls what jsonargparse 4.53 has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "seeds").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_makes_its_maker(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert content["data"]["class_path"].rpartition(".")[2] in datamodules.__all__
    model = content["model"]
    model["init_args"].setdefault("model", "given on the command line")
    if model["class_path"].endswith("Cam"):
        del model["init_args"]["model"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    made = parser.instantiate_classes(parser.parse_object({"model": model})).model
    assert isinstance(made, SeedMaker)


def test_clip_es_writes_its_dialect_from_the_command_line(
    worded_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voc = write_voc(tmp_path)
    rows = zip(IDS, CLASSES, strict=True)
    lines = [f"{name} {' '.join(str(label - 1) for label in labels)}" for name, labels in rows]
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    config = next(path for path in CONFIGS if path.stem == "clip_es")
    words = ["predict", "-c", str(config), "--data.root", str(voc), "--data.labels", "labels.txt"]
    words += ["--model.model", str(worded_clip_folder), "--model.pretrained", "null"]
    words += ["--model.background_words", "[person, car]", "--out", "out"]
    words += ["--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    assert main(words) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["model"]["init_args"]["background_words"] == ["person", "car"]
    classes = datamodules.VOCDataModule(voc, seeds=tmp_path / "out" / "soft")._read_classes()
    seeds = open_seeds(tmp_path / "out" / "soft", classes, "clip_es", None)
    for name, labels, size in zip(IDS, CLASSES, SIZES, strict=True):
        seed = seeds.read(name, size, None)
        assert seed.class_ids == tuple(sorted(labels))
        assert seed.scores.shape == (len(labels), *size)
