"""Every YAML under configs/refine and configs/trainer on a fake tree with a tiny real model."""

import json
from pathlib import Path

import pytest
import yaml
from fake_voc import IDS, write_voc

from g4seg_pl.main import main

# LightningCLI 2.6 calls what jsonargparse 4.53 has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

CONFIGS = Path(__file__).parents[2] / "configs"
DATA_FILES = sorted(
    path
    for path in (CONFIGS / "refine").glob("*.yaml")
    if "data" in yaml.safe_load(path.read_text())
)
ADDED_FILES = sorted({*(CONFIGS / "refine").glob("*.yaml")} - set(DATA_FILES))
TRAINERS = sorted((CONFIGS / "trainer").glob("*.yaml"))


def predict_words(root: Path, model: Path, *configs: Path) -> list[str]:
    """Arguments that point the configurations at the fake tree."""
    settings = yaml.safe_load(configs[0].read_text())["data"]
    words = ["predict", *(word for config in configs for word in ("-c", str(config)))]
    words += ["--model.model", str(model), "--out", str(root / "out"), "--data.num_workers", "0"]
    words += ["--data.seeds", str(root / "cam_out"), "--trainer.accelerator", "cpu"]
    if "Folder" in settings["class_path"]:
        images = root / "VOCdevkit" / "VOC2012" / "JPEGImages"
        return [*words, "--data.root", str(images), "--data.class_names", "voc"]
    # The fake seeds are in CLIP-ES's dialect, whatever the file is made for.
    return [*words, "--data.root", str(root), "--data.dialect", "auto"]


def write_tree(root: Path, config: Path) -> None:
    """The tree with the list that the configuration asks for."""
    settings = yaml.safe_load(config.read_text())["data"].get("init_args", {})
    write_voc(root, split=settings.get("split", "train"))


@pytest.mark.parametrize("config", DATA_FILES, ids=lambda path: path.stem)
def test_refine_config_runs(config: Path, tmp_path: Path, sd1_folder: Path) -> None:
    write_tree(tmp_path, config)
    assert main(predict_words(tmp_path, sd1_folder, config)) == 0
    assert {path.stem for path in (tmp_path / "out" / "masks").iterdir()} == set(IDS)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seed_dialect"] == "clip_es"


@pytest.mark.parametrize("added", ADDED_FILES, ids=lambda path: path.stem)
def test_added_config_runs(added: Path, tmp_path: Path, sd1_folder: Path) -> None:
    pytest.importorskip("pydensecrf")
    config = CONFIGS / "refine" / "voc_clip_es.yaml"
    write_tree(tmp_path, config)
    assert main(predict_words(tmp_path, sd1_folder, config, added)) == 0
    assert "DenseCRF" in (tmp_path / "out" / "run.json").read_text()


@pytest.mark.parametrize("config", TRAINERS, ids=lambda path: path.stem)
def test_trainer_config_is_understood(
    config: Path, tmp_path: Path, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parsed in full; GPUs and SLURM are not here to be run on."""
    refine = CONFIGS / "refine" / "voc_clip_es.yaml"
    words = predict_words(tmp_path, sd1_folder, refine, config)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert ended.value.code == 0
    wanted = yaml.safe_load(config.read_text())["trainer"]
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]
    wanted.pop("accelerator")  # the command line's, which must win
    for plugin in printed["plugins"] or []:
        plugin["init_args"].pop("requeue_signal", None)
    assert {name: printed[name] for name in wanted} == wanted
