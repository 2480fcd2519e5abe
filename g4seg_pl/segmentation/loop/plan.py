"""What the loop compares, at which size, and under which names results lie on disk."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

from g4seg_pl.callbacks.crf import CRFSettings, preset
from g4seg_pl.callbacks.run_record import Json, describe
from g4seg_pl.core.background import Threshold
from g4seg_pl.core.steps import UpdateStep
from g4seg_pl.lab.cache import hash_of_files, key_of
from g4seg_pl.types import ConfigurationError
from g4seg_pl.world.folders import CLIP, GENERATOR
from g4seg_pl.world.settings import BACKGROUNDS, PROVENANCE, RECIPES

RowName = Literal["seed", "seed+crf", "g4seg", "g4seg+crf", "truth"]
ROWS: tuple[RowName, ...] = get_args(RowName)
CONFIG = Path(__file__).parents[3] / "configs" / "train" / "scenes_small.yaml"
PREFERRED_RECIPES = ("g4seg-best", "g4seg")
# VOC's pictures are eight times as large as a scene: as in configs/paper/choose.yaml.
CRF_PRESET: Literal["clip_es"] = "clip_es"
CRF_SCALE = 0.13
NOISE_SEED = 0


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        train: scenes with labels to train on.
        val: scenes with truth that pick the best epoch.
        test: scenes with truth that are reported.
        steps: of each training.
        repeats: trainings a row, with seeds from 0 on.
        width: of the network.
        first: index of the first training scene; beyond those that the embedded models saw.
    """

    train: int
    val: int
    test: int
    steps: int
    repeats: int
    width: int
    first: int = 5_000_000


SCALES = {
    "full": Scale(train=2000, val=300, test=1000, steps=3000, repeats=3, width=16),
    "small": Scale(train=6, val=2, test=3, steps=2, repeats=2, width=4),
}


@dataclass(frozen=True)
class Training:
    """One network.

    Attributes:
        row: what it is trained on.
        seed: of its weights, order and augmentation.
    """

    row: RowName
    seed: int


def background(row: str) -> Threshold:
    """Where labels of ``seed`` and ``g4seg`` begin; the dense CRF is given the same."""
    return BACKGROUNDS["seed" if row == "seed" else recipe()[0]]


def recipe() -> tuple[str, tuple[UpdateStep, ...]]:
    """Name and steps of the refiner: the chosen recipe if there is one, else the paper's.

    Raises:
        ConfigurationError: the settings hold neither.
    """
    for name in PREFERRED_RECIPES:
        if name in RECIPES:
            return name, RECIPES[name]
    message = f"settings.RECIPES has {list(RECIPES)}; it needs one of {list(PREFERRED_RECIPES)}"
    raise ConfigurationError(message)


def crf_settings() -> CRFSettings:
    """CLIP-ES's dense CRF, its widths scaled to the scenes' size."""
    return preset(CRF_PRESET).scaled(CRF_SCALE)


def describe_labels(row: RowName) -> Json:
    """Everything that determines the labels of a row, but the scenes."""
    if row == "truth":
        return {"truth": "exact masks"}
    found: dict[str, Json] = {
        "seeds": "Grad-CAM of the embedded CLIP",
        "clip": _weights(CLIP),
        # Its own alone: another recipe must not make the seeds' networks train again.
        "background": repr(background(row.partition("+")[0])),
    }
    if row.startswith("g4seg"):
        name, steps = recipe()
        found |= {"recipe": name, "steps": [describe(step) for step in steps]}
        found |= {"steps_repr": repr(steps), "generator": _weights(GENERATOR)}
        found |= {"noise_seed": NOISE_SEED, "settings": PROVENANCE}
    if row.endswith("+crf"):
        found["crf"] = asdict(crf_settings()) | {"preset": CRF_PRESET, "scale": CRF_SCALE}
    return found


def describe_training(scale: Scale) -> Json:
    """Everything that determines a training, but its labels and its seed."""
    return {"scale": asdict(scale), "config": CONFIG.read_text(encoding="utf-8")}


@dataclass(frozen=True)
class Places:
    """Where the loop keeps its work; names change with whatever determines the content.

    Attributes:
        root: the folder.
        scale: how much is done.
    """

    root: Path
    scale: Scale

    @property
    def tree(self) -> Path:
        """The scenes, in VOC's layout."""
        size = self.scale
        name = f"tree-{size.first}-{size.train}-{size.val}-{size.test}"
        return self.root / name / "VOCdevkit" / "VOC2012"

    def labels(self, row: RowName) -> Path | None:
        """The folder of a row's label files; None for the truth, which lies in the tree."""
        return None if row == "truth" else self.root / "labels" / _named(row, describe_labels(row))

    def training(self, training: Training) -> Path:
        """The folder of a training: checkpoints, logs and result.json."""
        described = [describe_labels(training.row), describe_training(self.scale)]
        return self.root / "train" / _named(training.row, described) / f"seed{training.seed}"


def _named(row: RowName, described: Json) -> str:
    return f"{row.replace('+', '-')}-{key_of(described)}"


@lru_cache
def _weights(folder: Path) -> str:
    return hash_of_files(folder)
