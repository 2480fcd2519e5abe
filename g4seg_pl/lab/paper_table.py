"""One table of the paper: its YAML, expanded to runs, and the paper's figures (P) beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from datamodules.seed_files.maps import ReadOptions
from g4seg_pl.callbacks.run_record import describe
from g4seg_pl.core.background import BackgroundRule, PowerBackground, Threshold
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab.cache import Store
from g4seg_pl.lab.compare import IN_THE_WORLD as WORLD_PASSES
from g4seg_pl.lab.compare import ON_DATA as DATA_PASSES
from g4seg_pl.lab.compare import WAYS, read_ways, ways_of
from g4seg_pl.lab.laboratory import REPOSITORY, Lab
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.scores import Line, Scores, line
from g4seg_pl.lab.sources import DataSource, SeedKind, Source
from g4seg_pl.lab.stages import Way
from g4seg_pl.lab.table import Cell, Table
from g4seg_pl.lab.tables.groups import group_rows
from g4seg_pl.lab.written import object_text
from g4seg_pl.types import ConfigurationError
from g4seg_pl.world.folders import GENERATOR

CONFIGS = REPOSITORY / "configs" / "paper"
WRITTEN = "configs/paper/ways.yaml"
IN_THE_WORLD = (
    "Measured in the embedded world: its scenes, seeds and small generator stand in for the "
    "paper's. Figures marked (P) are the paper's, on real data; the two cannot be compared."
)
ON_DATA = "Measured on the data and with the model given; figures marked (P) are the paper's."


@dataclass(frozen=True)
class Data:
    """Real data: where it lies.

    Attributes:
        root: folder of the data set.
        seeds: folder of seed files, or one that has a folder a row, named as the row's ``seeds``.
        split: instead of the table's.
        dialect: of the seed files.
        seed_options: what the seed files do not say themselves.
    """

    root: Path | None = None
    seeds: Path | None = None
    split: str | None = None
    dialect: str = "auto"
    seed_options: ReadOptions | None = None


@dataclass(frozen=True)
class Model:
    """The generator.

    Attributes:
        model: a diffusers folder or hub id; the embedded generator if None.
        device: None takes a GPU if there is one.
        masks_per_pass: masks that enter a network at once, the bound on memory; None for 8 on
            data, 32 of the embedded world's small ones.
    """

    model: str | None = None
    device: str | None = None
    masks_per_pass: int | None = None


@dataclass(frozen=True)
class Options:
    """What a table is run with: the arguments of `paper`, which says what each means."""

    table: str
    world: bool
    data: Data
    model: Model
    rows: str | None
    images: int | None
    noise_seeds: int
    background: Threshold | PowerBackground | None
    chosen: Path
    clip: Path
    features: DenseFeatures | None
    configs: Path
    store: Path
    out: Path
    resamples: int
    quiet: bool


class PaperTable:
    """One table: its YAML, expanded to runs.

    Args:
        options: of the command.

    Attributes:
        complete: whether no image of the rows that were run had to be left out.

    Raises:
        ConfigurationError: there is no such table or row, or neither world nor data is given.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.complete = True
        path = options.configs / f"{options.table}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in options.configs.glob("*-*.yaml")))
            message = f"no {path}; known tables are {known}"
            raise ConfigurationError(message)
        if not options.world and (options.data.root is None or options.data.seeds is None):
            message = "give --world, or --data.root and --data.seeds (and --model.model)"
            raise ConfigurationError(message)
        self.plan: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.rows = [row for row in self.plan["rows"] if (options.rows or "") in row["row"]]
        if not self.rows:
            known = ", ".join(repr(row["row"]) for row in self.plan["rows"])
            message = f"rows: none of {options.table} holds {options.rows!r}; there are {known}"
            raise ConfigurationError(message)
        if not options.world and options.model.model is None:
            message = (
                "model.model: None given, and the embedded generator knows its scenes alone; give "
                "a diffusers folder or hub id"
            )
            raise ConfigurationError(message)
        passes = options.model.masks_per_pass or (WORLD_PASSES if options.world else DATA_PASSES)
        models = Models(
            options.model.model or GENERATOR,
            options.clip,
            options.model.device,
            masks_per_pass=passes,
        )
        self.lab = Lab(
            models,
            Store(options.store),
            chosen_file=options.chosen,
            images=options.images or 300,
            noise_seeds=tuple(range(options.noise_seeds)),
            resamples=options.resamples,
            quiet=options.quiet,
        )

    @property
    def features(self) -> DenseFeatures:
        """F of Eq. 8: what was asked for, else the world's own or the autoencoder's."""
        if self.options.features is not None:
            return self.options.features
        return self.lab.features if self.options.world else VAEFeatures()

    def table(self) -> Table:
        """Run every row that can be run and say why the others cannot."""
        rows: list[dict[str, Cell]] = []
        for row in self.rows:
            rows += self._rows(row)
        world = self.options.world
        where = "the embedded world" if world else f"{self.options.data.root}"
        protocol = {
            "measured on": where,
            "generator": str(self.options.model.model or "embedded"),
            "F of Eq. 8": object_text(describe(self.features)),
            "noise seeds": self.options.noise_seeds,
            "settings": self._settings(),
            "unit": "percent; ± bootstrap standard error over images, gains paired",
        }
        notes = (IN_THE_WORLD if world else ON_DATA, *self.plan.get("notes", ()))
        signed = ("gain",)
        return Table(self.options.table, self.plan["title"], tuple(rows), protocol, notes, signed)

    def _settings(self) -> str:
        """Where the settings of the ways are from."""
        if not self.options.world:
            return WRITTEN
        used = [row for row in self.rows if not row.get("not_here")]
        names = {name for row in used for name in self.here(row, "ways") if name != "seed"}
        written = {n for row in used for n in self.here(row, "ways") if not self._is_chosen(row, n)}
        if not written:
            return "chosen on validation scenes"
        others = f"others chosen on validation scenes; {', '.join(sorted(written))}: {WRITTEN}"
        return others if names - written else WRITTEN

    def _written(self) -> dict[str, list[Any]]:
        """Stages by name, from a file beside the table's if there is one."""
        own = self.options.configs / WAYS.name
        return read_ways(own if own.is_file() else WAYS)

    def _is_chosen(self, row: Mapping[str, Any], name: str) -> bool:
        """Whether a way has settings of its own for the row's kind of seeds in the world."""
        if name == "seed":
            return True
        return not row.get("as_written", False) and self.lab.has(row["world"], name)

    def _rows(self, row: Mapping[str, Any]) -> list[dict[str, Cell]]:
        reason = row.get("not_here") if self.options.world else row.get("needs")
        published: dict[str, Any] = self.here(row, "paper") or {}
        if reason:
            told: dict[str, Cell] = {"row": row["row"], "not run": str(reason)}
            return [told | {"way": name, "(P)": value} for name, value in published.items()]
        source, rule = self.source(row)
        ways = self.ways(row)
        every = [Way("seed"), *ways]
        runner = self.lab.runner(self.features)
        found = runner.run(every, source, rule, self.lab.noise_seeds)
        head: dict[str, Cell] = {"row": row["row"], "seeds": source.kind, "split": source.split}
        head |= {"images": len(found["seed"][0].ids), "background": repr(rule)}
        if (left_out := len(source.ids) - len(found["seed"][0].ids)) > 0:
            head["left out"] = left_out
            self.complete = False
        if row.get("by_quality"):
            return self._by_quality(row, head, found)
        measured = [line(n, found["seed"], runs, self.lab.resamples) for n, runs in found.items()]
        return [head | _row_of(each, published.get(each.way)) for each in measured]

    def source(self, row: Mapping[str, Any]) -> tuple[Source, BackgroundRule]:
        """A row's images with coarse masks, and the rule of their background."""
        if self.options.world:
            kind: SeedKind = row["world"]
            return self.lab.source(kind), self.lab.background(kind)
        data = self.options.data
        described = row["data"]
        module, _, name = str(described["class_path"]).rpartition(".")
        arguments = dict(described.get("init_args") or {}) | {"root": data.root}
        arguments |= {"seeds": self._seeds(row), "num_workers": 0, "dialect": data.dialect}
        arguments["seed_options"] = data.seed_options
        if data.split is not None:
            arguments["split"] = data.split
        made = getattr(import_module(module), name)(**arguments)
        rule = self.options.background or _rule(row.get("background"))
        return DataSource(made, str(row["seeds"]), self.options.images), rule

    def _seeds(self, row: Mapping[str, Any]) -> Path:
        given = self.options.data.seeds
        assert given is not None
        own = given / str(row["seeds"])
        if own.is_dir():
            return own
        kinds = dict.fromkeys(str(each["seeds"]) for each in self.rows if not each.get("needs"))
        if len(kinds) > 1:
            message = (
                f"data.seeds: these rows have several kinds of seeds and there is no {own}; make "
                f"a folder for each of {', '.join(kinds)}, or choose one by --rows {row['row']!r}"
            )
            raise ConfigurationError(message)
        return given

    def here(self, row: Mapping[str, Any], field: str) -> Any:
        """A row's field; in the world its own for the world, if it has one."""
        own = f"world_{field}"
        return row[own] if self.options.world and own in row else row.get(field)

    def ways(self, row: Mapping[str, Any]) -> list[Way]:
        """A row's ways but for the seed itself."""
        names = [name for name in self.here(row, "ways") if name != "seed"]
        if not self.options.world:
            return ways_of(names, self._written())
        kind: SeedKind = row["world"]
        written = self._written()
        return [
            self.lab.way(kind, name) if self._is_chosen(row, name) else ways_of([name], written)[0]
            for name in names
        ]

    def _by_quality(
        self,
        row: Mapping[str, Any],
        head: Mapping[str, Cell],
        found: Mapping[str, Sequence[Scores]],
    ) -> list[dict[str, Cell]]:
        rows: list[dict[str, Cell]] = []
        for name, runs in found.items():
            if name == "seed":
                continue
            published = row.get("paper", {}) if name == "g4seg" else {}
            for group in group_rows(self.lab, str(head["seeds"]), name, found["seed"], runs):
                label = str(group["group"])
                if label.startswith("seed IoU"):
                    rows.append({**head, **group, "(P)": published.get(label)})
        return rows


def _row_of(each: Line, published: float | None) -> dict[str, Cell]:
    return {
        "way": each.way,
        "(P)": published,
        "mIoU": each.miou,
        "mIoU_se": each.miou_se,
        "gain": each.gain,
        "gain_se": each.gain_se,
        "boundary IoU": each.boundary_iou,
        "s/mask": each.seconds,
    }


def _rule(written: Mapping[str, float] | None) -> BackgroundRule:
    if written and "power" in written:
        return PowerBackground(float(written["power"]))
    return Threshold(float((written or {}).get("threshold", 0.5)))
