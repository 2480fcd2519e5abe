"""Every YAML under configs/refine and configs/trainer on a fake tree with a tiny real model."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_voc import IDS, write_voc
from PIL import Image

from g4seg_pl.backbones.controlnet import require_injection
from g4seg_pl.core.confidence import Averaged
from g4seg_pl.core.likelihood import ChooseByLikelihood
from g4seg_pl.core.steps import Correspondence
from g4seg_pl.lab.written import build_stages
from g4seg_pl.main import main
from g4seg_pl.recipes import steps_of

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
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["seed_dialect"] == "clip_es"
    assert record["class_names"][:2] == ["aeroplane", "bicycle"]


def added_run(root: Path, model: Path, added: Path, *words: str) -> str:
    """Run a file behind ``voc_clip_es.yaml`` and return the run's record."""
    config = CONFIGS / "refine" / "voc_clip_es.yaml"
    write_tree(root, config)
    assert main([*predict_words(root, model, config, added), *words]) == 0
    assert {path.stem for path in (root / "out" / "masks").iterdir()} == set(IDS)
    return (root / "out" / "run.json").read_text()


def test_crf_config_runs(tmp_path: Path, sd1_folder: Path) -> None:
    pytest.importorskip("pydensecrf")
    added = CONFIGS / "refine" / "crf_clip_es.yaml"
    assert "DenseCRF" in added_run(tmp_path, sd1_folder, added)


def test_uncertain_pixels_are_ignored_behind_the_crf(tmp_path: Path, sd1_folder: Path) -> None:
    """Labels agree with those of a run without it, less what its soft maps are unsure of."""
    pytest.importorskip("pydensecrf")
    files = [CONFIGS / "refine" / f"{name}.yaml" for name in ("voc_clip_es", "crf_clip_es")]
    write_tree(tmp_path, files[0])
    words = ["--writer.soft", "npz", "--out"]
    whole = predict_words(tmp_path, sd1_folder, *files)
    assert main([*whole, *words, str(tmp_path / "whole")]) == 0
    ignoring = CONFIGS / "refine" / "ignore_uncertain.yaml"
    sure = predict_words(tmp_path, sd1_folder, *files, ignoring)
    assert main([*sure, *words, str(tmp_path / "sure")]) == 0
    counts = np.zeros(2, int)
    for name in IDS:
        before, after = (
            np.asarray(Image.open(tmp_path / run / "masks" / f"{name}.png"))
            for run in ("whole", "sure")
        )
        marginals = np.load(tmp_path / "sure" / "soft" / f"{name}.npz")["foreground"].astype(float)
        highest = np.maximum(marginals.max(0, initial=0), 1 - marginals.sum(0))
        clear = np.abs(highest - 0.95) > 1e-3  # soft maps are kept in half precision
        assert np.array_equal((after == 255)[clear], (highest < 0.95)[clear])
        assert np.array_equal(after[after != 255], before[after != 255])
        counts += [(after == 255).sum(), (after != 255).sum()]
    assert counts.min() > 0


def test_best_config_runs_and_is_the_recipe(tmp_path: Path, sd1_folder: Path) -> None:
    config = CONFIGS / "refine" / "best.yaml"
    record = json.loads(added_run(tmp_path, sd1_folder, config))
    assert "PowerBackground" in json.dumps(record)  # the first file's settings still hold
    written = yaml.safe_load(config.read_text())["model"]["update"]
    assert build_stages(written) == steps_of("best")
    ways = yaml.safe_load((CONFIGS / "paper" / "ways.yaml").read_text())
    assert build_stages(ways["best"]) == steps_of("best")  # of `g4seg compare --data`


@pytest.mark.parametrize("name", ["sdxl", "lcm"])
def test_config_of_another_generator_runs(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"{name}_folder")
    assert added_run(tmp_path, model, CONFIGS / "refine" / f"{name}.yaml")


def test_controlnet_config_runs(tmp_path: Path, sd1_folder: Path, controlnet_folder: Path) -> None:
    words = ("--model.controlnet.model", str(controlnet_folder))
    record = added_run(tmp_path, sd1_folder, CONFIGS / "refine" / "controlnet.yaml", *words)
    settings = json.loads(record)
    assert str(controlnet_folder) in record
    assert '"train": "bus"' in json.dumps(settings)


def test_a_controlnet_that_nothing_would_use_stops_the_run(
    tmp_path: Path, sd1_folder: Path, controlnet_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [CONFIGS / "refine" / f"{name}.yaml" for name in ("voc_clip_es", "best", "controlnet")]
    write_tree(tmp_path, files[0])
    words = predict_words(tmp_path, sd1_folder, *files)
    assert main([*words, "--model.controlnet.model", str(controlnet_folder)]) == 1
    assert "no update step injects masks" in capsys.readouterr().err
    require_injection([Averaged([Correspondence()])])
    require_injection([ChooseByLikelihood([[Averaged([Correspondence()])]], injection_weight=0.0)])
    assert not list((tmp_path / "out").rglob("*.png"))


def test_tiny_decoder_config_runs_and_is_recorded(
    tmp_path: Path,
    sd1_folder: Path,
    tiny_decoder_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    added, decoder = CONFIGS / "refine" / "tiny_decoder.yaml", str(tiny_decoder_folder)
    assert yaml.safe_load(added.read_text())["model"]["decoder"] == "madebyollin/taesd"
    record = json.loads(added_run(tmp_path, sd1_folder, added, "--model.decoder", decoder))
    assert record["config"]["model"]["init_args"]["decoder"] == decoder
    plain = predict_words(tmp_path, sd1_folder, CONFIGS / "refine" / "voc_clip_es.yaml")
    assert main(plain) != 0
    assert "differs in model.init_args.decoder" in capsys.readouterr().err


def test_a_class_without_a_colour_stops_the_run_before_weights_load(
    tmp_path: Path,
    sd1_folder: Path,
    controlnet_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = CONFIGS / "refine" / "voc_clip_es.yaml"
    write_tree(tmp_path, config)
    words = predict_words(tmp_path, sd1_folder, config)
    loaded: list[str] = []
    monkeypatch.setattr("g4seg_pl.module.load_generator", lambda *_: loaded.append("weights"))
    assert main([*words, "--model.controlnet.model", str(controlnet_folder)]) != 0
    assert "no class near to train; give each an ADE20K class" in capsys.readouterr().err
    assert not loaded


def test_every_added_config_is_run_here() -> None:
    assert {path.stem for path in ADDED_FILES} == {
        "best",
        "crf_clip_es",
        "ignore_uncertain",
        "sdxl",
        "lcm",
        "controlnet",
        "tiny_decoder",
    }


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
