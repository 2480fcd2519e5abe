"""Where images with coarse masks and truth come from: scenes of the world, or a DataModule."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from g4seg_pl.callbacks.resume import classes_of
from g4seg_pl.callbacks.run_record import NOT_COMPARED, Json, describe
from g4seg_pl.lab.cache import Store, state_of_files
from g4seg_pl.lab.models import Models
from g4seg_pl.seeds.base import SeedMaker
from g4seg_pl.seeds.diffsegmenter import DiffSegmenter
from g4seg_pl.types import BadItemError, ConfigurationError, Sample, Seed
from g4seg_pl.world.degrade import degrade
from g4seg_pl.world.load import load_seed_maker
from g4seg_pl.world.scenes import CLASS_NAMES, FIRST_SEED, Split, draw_scene

SeedKind = Literal[
    "gradcam",
    "clip_es",
    "cross_attention",
    "degraded",
    "degraded_0_40",
    "degraded_40_80",
    "degraded_80_100",
]
SEED_KINDS: tuple[SeedKind, ...] = get_args(SeedKind)
BANDS: dict[str, tuple[float, float]] = {
    "degraded_0_40": (0.0, 0.4),
    "degraded_40_80": (0.4, 0.8),
    "degraded_80_100": (0.8, 1.0),
}
# What `g4seg_pl.world.load.load_seed_maker` makes of a model; results are filed under it.
MAKER = "patches, elementwise"
# What the fault of a band is made from: strengths tried until a mask's IoU falls inside.
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0)
TRIES = 6


class Source(ABC):
    """A sequence of images with coarse masks and truth.

    Attributes:
        kind: name of the kind of seeds, for tables and thresholds.
        split: ``val`` to choose on, anything else to report.
        num_classes: labels, background included.
    """

    kind: str
    split: str
    num_classes: int

    @property
    @abstractmethod
    def ids(self) -> tuple[str, ...]:
        """The images, in order."""

    @abstractmethod
    def samples(self, ids: Sequence[str]) -> list[Sample]:
        """Images with seeds and truth; those that cannot be read are left out."""

    @abstractmethod
    def describe(self) -> Json:
        """What determines the seeds of any image, in terms JSON can hold."""


class SceneSource(Source):
    """Scenes of the embedded world.

    Args:
        models: whose CLIP or generator makes the seeds.
        store: where they are kept.
        kind: how seeds are made.
        split: disjoint ranges of scenes.
        count: number of scenes.
        first: index of the first within the split.
        max_objects: as in `draw_scene`.
    """

    def __init__(
        self,
        models: Models,
        store: Store,
        kind: SeedKind = "gradcam",
        split: Split = "test",
        count: int = 300,
        first: int = 0,
        max_objects: int = 3,
    ) -> None:
        if kind not in SEED_KINDS:
            message = f"kind is {kind!r}; give one of {', '.join(SEED_KINDS)}"
            raise ConfigurationError(message)
        self.models, self.store = models, store
        self.kind: SeedKind = kind
        self.split: Split = split
        self.count, self.first, self.max_objects = count, first, max_objects
        self.num_classes = len(CLASS_NAMES) + 1
        self._maker: SeedMaker | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """``scene_<number>``, as the data module names them."""
        start = FIRST_SEED[self.split] + self.first
        return tuple(f"scene_{start + index:08d}" for index in range(self.count))

    def samples(self, ids: Sequence[str]) -> list[Sample]:
        """Draw scenes and make, or read again, their seeds."""
        plain = [self._draw(name) for name in ids]
        what = {"seeds": self.describe(), "ids": list(ids), "holds": "maps and class ids"}
        saved = self.store.load("seeds", what)
        if saved is None:
            saved = _packed([self._seed(sample) for sample in plain])
            self.store.save("seeds", what, saved)
        seeds = _unpacked(saved)
        return [_with_seed(sample, seed) for sample, seed in zip(plain, seeds, strict=True)]

    def describe(self) -> Json:
        """Kind, scenes, and the model that the seeds depend on."""
        model: Json = None
        if self.kind in ("gradcam", "clip_es"):
            model = [self.models.clip_identity, MAKER]
        elif self.kind == "cross_attention":
            model = self.models.generator_identity
        scenes = scenes_identity()
        return {
            "kind": self.kind,
            "max_objects": self.max_objects,
            "model": model,
            "scenes": scenes,
        }

    def _draw(self, name: str) -> Sample:
        scene = draw_scene(int(name.removeprefix("scene_")), max_objects=self.max_objects)
        size = (len(scene.labels), *scene.mask.shape)
        return Sample(
            image_id=name,
            image=torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(),
            seed=Seed(scene.labels, torch.zeros(size)),
            class_names=tuple(CLASS_NAMES[label - 1] for label in scene.labels),
            truth=torch.from_numpy(scene.mask),
        )

    def _seed(self, sample: Sample) -> Seed:
        if not self.kind.startswith("degraded"):
            with torch.no_grad():
                made = self._loaded_maker().make(sample)
            return Seed(made.class_ids, made.foreground)
        assert sample.truth is not None
        number = int(sample.image_id.removeprefix("scene_"))
        exact = [(sample.truth == label).numpy() for label in sample.seed.class_ids]
        pairs = zip(exact, sample.seed.class_ids, strict=True)
        maps = [_degraded(mask, self.kind, number * 13 + label) for mask, label in pairs]
        return Seed(sample.seed.class_ids, torch.from_numpy(np.stack(maps)))

    def _loaded_maker(self) -> SeedMaker:
        if self._maker is None:
            self._maker = make_seed_maker(self.kind, self.models)
        return self._maker


class DataSource(Source):
    """Any data module of this package, with its seeds and truth.

    Args:
        data: the data module.
        kind: what to call its seeds.
        limit: only the first images; None for all.
    """

    def __init__(self, data: Any, kind: str, limit: int | None = None) -> None:
        data.setup("test")
        self.data, self.kind = data, kind
        self.split = str(getattr(data, "split", "all"))
        self.num_classes = len(data.class_list) + 1
        self._items = {item.image_id: item for item in data.items[:limit]}
        self._files = self._state_of_files()

    @property
    def ids(self) -> tuple[str, ...]:
        """The data module's images."""
        return tuple(self._items)

    def samples(self, ids: Sequence[str]) -> list[Sample]:
        """Read images with seeds and truth; one that cannot be read is named and left out."""
        found = []
        for name in ids:
            try:
                sample = self.data.reader.read(self._items[name], with_truth=True)
            except (BadItemError, OSError) as error:
                print(f"left out: {name}: {error}", flush=True)
                continue
            if sample.truth is not None:
                found.append(sample)
        return found

    def describe(self) -> Json:
        """The data module's arguments, and what tells its files from changed ones."""
        arguments = _without_speed(describe(self.data))
        classes = classes_of(self.data)
        return {"kind": self.kind, "data": arguments, "classes": classes, "files": self._files}

    def _state_of_files(self) -> str:
        """Hash of the sizes and times of change of pictures, truth and seeds that lie here."""
        return state_of_files(self._read_paths())

    def _read_paths(self) -> Iterator[Path]:
        yield Path(str(self.data.labels))  # a file, or a word that names none
        seeds = self.data.reader.seeds
        for name, item in self._items.items():
            try:
                seed = seeds.path(name) if hasattr(seeds, "path") else self.data.seeds
            except BadItemError:
                seed = None  # it is named when it is read
            # Of a member of a tar, the tar.
            files = (item.image, item.truth, seed)
            yield from (Path(str(getattr(getattr(f, "source", None), "url", f))) for f in files)


def _without_speed(description: Json) -> Json:
    """A data module's description without the arguments that change no image."""
    if not isinstance(description, dict):
        return description
    arguments = description.get("init_args", {})
    kept = {name: each for name, each in arguments.items() if name not in NOT_COMPARED}
    return {**description, "init_args": kept}


def _packed(seeds: Sequence[Seed]) -> dict[str, NDArray[Any]]:
    """Seeds as arrays, in half precision."""
    return {
        "maps": np.concatenate([seed.scores.numpy() for seed in seeds]).astype(np.float16),
        "class_ids": np.concatenate([np.asarray(seed.class_ids, np.int64) for seed in seeds]),
        "counts": np.asarray([len(seed.class_ids) for seed in seeds]),
    }


def _unpacked(arrays: dict[str, NDArray[Any]]) -> list[Seed]:
    ends = np.cumsum(arrays["counts"])[:-1]
    maps = np.split(arrays["maps"].astype(np.float32), ends)
    classes = np.split(arrays["class_ids"], ends)
    return [
        Seed(tuple(int(each) for each in ids), torch.from_numpy(part))
        for ids, part in zip(classes, maps, strict=True)
    ]


def _with_seed(sample: Sample, seed: Seed) -> Sample:
    """The sample with a seed, whose classes need not be those of the scene."""
    names = tuple(CLASS_NAMES[label - 1] for label in seed.class_ids)
    return replace(sample, seed=seed, class_names=names)


def make_seed_maker(kind: SeedKind, models: Models) -> SeedMaker:
    """Return the loaded maker of a kind of seeds."""
    if kind == "cross_attention":
        cross = DiffSegmenter(str(models.generator), prompt_template="a photo of {}")
        cross.generator = models.refiner().generator  # type: ignore[assignment]
        return cross
    return load_seed_maker(affinity=kind == "clip_es", clip=str(models.clip))


def _degraded(mask: NDArray[np.bool_], kind: str, seed: int) -> NDArray[np.float32]:
    if kind == "degraded":
        return degrade(mask, "mixed", seed)
    low, high = BANDS[kind]
    best, distance = degrade(mask, "mixed", seed), np.inf
    rng = np.random.default_rng([seed, 11])
    for strength in rng.permutation(np.repeat(STRENGTHS, TRIES)):
        tried = degrade(mask, "mixed", int(rng.integers(2**31)), float(strength))
        iou = mask_iou(tried > 0.5, mask)
        missed = max(low - iou, iou - high, 0.0)
        if missed < distance:
            best, distance = tried, missed
        if missed == 0:
            break
    return best


def mask_iou(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; 1 if both are empty."""
    union = int((first | second).sum())
    return float((first & second).sum() / union) if union else 1.0


@lru_cache
def scenes_identity() -> str:
    """Hash of a few scenes: it changes with the code that draws them."""
    digest = hashlib.sha256()
    for number in range(0, 60, 5):
        scene = draw_scene(FIRST_SEED["val"] + number)
        digest.update(scene.image.tobytes())
        digest.update(scene.mask.tobytes())
    return digest.hexdigest()[:16]
