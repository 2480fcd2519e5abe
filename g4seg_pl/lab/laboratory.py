"""What the tables share: sources, chosen settings, noise seeds, and lines of scores."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from g4seg_pl.callbacks.run_record import Json, describe
from g4seg_pl.core.background import Threshold
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab.cache import Store
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.runner import Runner
from g4seg_pl.lab.scores import Line, Scores, line
from g4seg_pl.lab.sources import SceneSource, SeedKind
from g4seg_pl.lab.stages import Stage, Way
from g4seg_pl.lab.written import build_object, build_stages
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import ConfigurationError
from g4seg_pl.world.scenes import Split

REPOSITORY = Path(__file__).parents[2]
CHOSEN = REPOSITORY / "docs" / "results" / "chosen.json"
MAIN_KINDS: tuple[SeedKind, ...] = ("gradcam", "cross_attention", "degraded")


@dataclass
class Lab:
    """The embedded world as the tables see it.

    Attributes:
        models: generator and CLIP.
        store: results on disk.
        results: where tables are written.
        chosen_file: what `choose` wrote; nothing else decides about settings.
        images: test scenes a table reports on.
        first: index of the first test scene.
        noise_seeds: at least three for a report.
        kinds: of seeds.
        resamples: of the bootstrap.
        quiet: print no progress.
    """

    models: Models
    store: Store
    results: Path = CHOSEN.parent
    chosen_file: Path = CHOSEN
    images: int = 300
    first: int = 0
    noise_seeds: tuple[int, ...] = (0, 1, 2)
    kinds: tuple[SeedKind, ...] = MAIN_KINDS
    resamples: int = 1000
    quiet: bool = True
    _runners: dict[str, Runner] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """What was chosen on validation scenes.

        Raises:
            ConfigurationError: nothing has been.
        """
        if not self.chosen_file.is_file():
            message = f"no {self.chosen_file}; run `python -m g4seg_pl.lab choose` first"
            raise ConfigurationError(message)
        read: dict[str, Any] = json.loads(self.chosen_file.read_text(encoding="utf-8"))
        return read

    @property
    def places(self) -> dict[str, str]:
        """What stands for ``{clip}`` and the like in written settings."""
        return {"clip": str(self.models.clip)}

    def source(
        self,
        kind: SeedKind,
        split: Split = "test",
        count: int | None = None,
        first: int | None = None,
    ) -> SceneSource:
        """Scenes with one kind of seeds; as many test scenes as tables report on by default."""
        count = self.images if count is None else count
        first = self.first if first is None else first
        return SceneSource(self.models, self.store, kind, split, count, first)

    @cached_property
    def features(self) -> DenseFeatures:
        """F of Eq. 8 as chosen on validation scenes; the generator's autoencoder before that.

        Raises:
            ConfigurationError: the file has settings but not the F that they were chosen with, or
                something that is no F.
        """
        read = self.chosen if self.chosen_file.is_file() else {}
        written = read.get("features")
        if written is None and read.get("kinds"):
            message = (
                f"{self.chosen_file}: features: none, but its kinds were chosen with some; run "
                "`python -m g4seg_pl.lab choose` anew"
            )
            raise ConfigurationError(message)
        if written is None:
            return VAEFeatures()
        made = build_object(written, self.places)
        if not isinstance(made, DenseFeatures):
            message = f"{self.chosen_file}: features: {written['class_path']} extracts none"
            raise ConfigurationError(message)
        return made

    def forget_chosen(self) -> None:
        """Read the file of chosen settings anew when next asked."""
        for name in ("chosen", "features"):
            self.__dict__.pop(name, None)
        self._runners.clear()

    def runner(self, features: DenseFeatures | None = None) -> Runner:
        """The runner with a feature extractor; the chosen one if None."""
        used = self.features if features is None else features
        name = str(describe(used))
        if name not in self._runners:
            self._runners[name] = Runner(self.models, self.store, used, self.quiet)
        return self._runners[name]

    def refiner(self) -> G4SegRefiner:
        """The generator with the chosen features, without steps."""
        return self.models.refiner(self.features)

    def background(self, kind: SeedKind) -> Threshold:
        """The background rule of a kind of seeds, chosen on validation scenes."""
        return Threshold(float(self._kind(kind)["seed"]["background"]))

    def has(self, kind: SeedKind, name: str) -> bool:
        """Whether settings were chosen for a way, or for every part of its name."""
        ways = self._kind(kind)["ways"]
        return name in ways or all(part in ways for part in name.split("+"))

    def way(self, kind: SeedKind, name: str) -> Way:
        """The way of a name at its chosen settings.

        A chain such as ``g4seg+dcrf`` that was not chosen as a whole is put together from the
        chosen parts, and its labels are made by the last part's threshold.

        Raises:
            ConfigurationError: nothing was chosen under that name.
        """
        ways = self._kind(kind)["ways"]
        if name == "seed":
            return Way("seed")
        if name in ways:
            return Way(name, self.build(ways[name]["stages"]), ways[name]["background"])
        parts = name.split("+")
        missing = [part for part in parts if part not in ways]
        if missing:
            message = f"way {missing[0]!r} was not chosen for {kind} seeds; add it to the grid"
            raise ConfigurationError(message)
        stages = [stage for part in parts for stage in ways[part]["stages"]]
        return Way(name, self.build(stages), ways[parts[-1]]["background"])

    def build(self, written: Sequence[Any]) -> tuple[Stage, ...]:
        """Return stages as YAML writes them; ``{clip}`` is the folder of the world's CLIP."""
        return build_stages(written, self.places)

    def scores(
        self,
        kind: SeedKind,
        ways: Sequence[Way],
        features: DenseFeatures | None = None,
        source: SceneSource | None = None,
    ) -> dict[str, list[Scores]]:
        """Scores of ways, the seed's under ``seed`` among them."""
        every = [Way("seed"), *(way for way in ways if way.name != "seed")]
        rule = self.background(kind)
        source = self.source(kind) if source is None else source
        return self.runner(features).run(every, source, rule, self.noise_seeds)

    def lines(
        self, kind: SeedKind, ways: Sequence[Way], features: DenseFeatures | None = None
    ) -> list[Line]:
        """A line of scores for the seed and for every way, gains over the seed."""
        found = self.scores(kind, ways, features)
        return [self.line(name, found["seed"], runs) for name, runs in found.items()]

    def line(self, name: str, reference: Sequence[Scores], runs: Sequence[Scores]) -> Line:
        """One line of scores."""
        return line(name, reference, runs, self.resamples)

    def protocol(self, *kinds: SeedKind) -> Json:
        """What is printed beside every table."""
        last = self.first + self.images - 1
        rules = {kind: self.background(kind).value for kind in kinds}
        return {
            "data": f"embedded world (64x64 scenes), test scenes {self.first} to {last}",
            "noise seeds": len(self.noise_seeds),
            "background": (
                f"threshold {_by_kind(rules)} for the seed, a way's own where it has one (chosen "
                "settings), all chosen on validation scenes"
            ),
            "settings": "chosen on validation scenes unless the row names them",
            "truth 255": "none in these scenes",
            "unit": "percent; gain over the seed ± bootstrap standard error over images, paired",
        }

    def _kind(self, kind: SeedKind) -> dict[str, Any]:
        kinds = self.chosen["kinds"]
        name = self.chosen.get("same_as", {}).get(kind, kind)
        if name not in kinds:
            message = f"nothing was chosen for {kind} seeds; run `choose` with kinds {kind}"
            raise ConfigurationError(message)
        found: dict[str, Any] = kinds[name]
        return found


def _by_kind(rules: dict[SeedKind, float]) -> str:
    if len(set(rules.values())) == 1:
        return f"{next(iter(rules.values())):g}"
    return ", ".join(f"{value:g} ({kind})" for kind, value in rules.items())
