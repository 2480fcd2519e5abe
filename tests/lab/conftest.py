"""A laboratory of twelve scenes on tiny real models, settings chosen on six validation scenes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from g4seg_pl.lab.cache import Store
from g4seg_pl.lab.choose import choose
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.runner import Runner

STEPS = "g4seg_pl.core.steps."
CONTROLS = "g4seg_pl.core.controls."
VAE = "g4seg_pl.features.vae.VAEFeatures"


def stage(path: str, **arguments: Any) -> dict[str, Any]:
    """A stage as YAML writes it."""
    return {"class_path": path, "init_args": arguments}


def grid() -> dict[str, Any]:
    """Every way that a table asks for by name, next to nothing to choose."""
    matching = stage(f"{STEPS}Correspondence", confidence_range=None, beta=0.8)
    affinity = stage("g4seg_pl.core.affinity.Affinity", mixing=0.3)
    clip = stage("g4seg_pl.features.open_clip.OpenClipFeatures", model="{clip}", image_size=64)
    ways: dict[str, Any] = {
        "g4seg": {"stages": [matching], "axes": {"0.beta": [0.5]}},
        "affinity": {"stages": [affinity]},
        "grounding": {"stages": [stage("g4seg_pl.core.grounding.Grounding")]},
        "gradient": {"stages": [stage("g4seg_pl.core.gradient.Gradient", iterations=1)]},
        "feature-nn": {"stages": [stage(f"{STEPS}Correspondence", matching="self")]},
        "noise-only": {"stages": [stage("g4seg_pl.lab.controls.NoiseOnly", timestep=100)]},
        "blurred-image": {"stages": [stage("g4seg_pl.lab.controls.Blurred")]},
        "clip-affinity": {
            "stages": [
                stage(
                    "g4seg_pl.lab.controls.WithFeatures",
                    features=clip,
                    steps=[stage(f"{CONTROLS}FeatureAffinity")],
                )
            ]
        },
        "blur": {
            "stages": [stage(f"{STEPS}Blur")],
            "axes": {"0.sigma": [0.0, 1.0]},
            "search": "product",
        },
        "best": {"base": "affinity+gradient"},
    }
    return {
        "scenes": 6,
        "kinds": ["degraded", "cross_attention"],
        "same_as": {
            "degraded_0_40": "degraded",
            "degraded_40_80": "degraded",
            "degraded_80_100": "degraded",
            "gradcam": "degraded",
            "clip_es": "degraded",
        },
        "features": {
            "kind": "degraded",
            "stages": [matching],
            "axes": {"0.beta": [0.8, 0.3]},
            "candidates": [stage(VAE, level=level) for level in (-1, 0)],
        },
        "ways": ways,
    }


def make_lab(models: Models, folder: Path, **options: Any) -> Lab:
    """A laboratory in a folder of its own."""
    results = folder / "docs" / "results"
    settings = {"images": 12, "noise_seeds": (0, 1), "kinds": ("degraded",), "resamples": 20}
    return Lab(
        models, Store(folder / "store"), results, results / "chosen.json", **(settings | options)
    )


@pytest.fixture(scope="session")
def models(sd1_folder: Path, clip_folder: Path) -> Models:
    return Models(sd1_folder, clip_folder, device="cpu")


@pytest.fixture
def runner(models: Models, tmp_path: Path) -> Runner:
    return Runner(models, Store(tmp_path))


@pytest.fixture(scope="session")
def grid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lab") / "grid.yaml"
    path.write_text(yaml.safe_dump(grid(), sort_keys=False))
    return path


@pytest.fixture(scope="session")
def lab(models: Models, grid_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    made = make_lab(models, tmp_path_factory.mktemp("lab"))
    choose(made, grid_file)
    return made
