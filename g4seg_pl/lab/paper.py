"""``g4seg paper``: the paper's tables, its figures (P) beside measured ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from g4seg_pl.callbacks.run_record import describe
from g4seg_pl.core.background import BackgroundRule, PowerBackground, Threshold
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab.cache import Store
from g4seg_pl.lab.compare import WAYS, read_ways, ways_of
from g4seg_pl.lab.laboratory import CHOSEN, REPOSITORY, Lab
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.scores import Line, Scores, line
from g4seg_pl.lab.sources import DataSource, SeedKind, Source
from g4seg_pl.lab.stages import Way
from g4seg_pl.lab.table import Cell, Table
from g4seg_pl.lab.tables.groups import group_rows
from g4seg_pl.lab.written import instantiated, object_text
from g4seg_pl.types import ConfigurationError
from g4seg_pl.world.folders import CLIP, GENERATOR

CONFIGS = REPOSITORY / "configs" / "paper"
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
        num_workers: reading processes; items are read in the main process here.
    """

    root: Path | None = None
    seeds: Path | None = None
    split: str | None = None
    dialect: str = "auto"


@dataclass(frozen=True)
class Model:
    """The generator.

    Attributes:
        model: a diffusers folder or hub id; the embedded generator if None.
        device: None takes a GPU if there is one.
    """

    model: str | None = None
    device: str | None = None


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


def paper(
    table: str,
    world: bool = False,
    data: Data | None = None,
    model: Model | None = None,
    rows: str | None = None,
    images: int | None = None,
    noise_seeds: int = 3,
    background: Threshold | PowerBackground | None = None,
    chosen: Path = CHOSEN,
    clip: Path = CLIP,
    features: DenseFeatures | None = None,
    configs: Path = CONFIGS,
    store: Path = Path("outputs/lab"),
    out: Path = Path("outputs/paper"),
    resamples: int = 1000,
    quiet: bool = False,
) -> int:
    """Run a table or draw a figure of the paper, in the embedded world or on real data.

    Args:
        table: table-1 to table-9, table-11, or fig-3 to fig-12.
        world: run in the embedded world.
        data: real data: --data.root, --data.seeds, --data.split, --data.dialect.
        model: the generator: --model.model, --model.device.
        rows: only rows whose label holds this text.
        images: at most so many of each row; in the world 300, of real data all; a figure
            chooses among its first 24.
        noise_seeds: how many.
        background: the seeds' rule on real data; the row's own if None.
        chosen: settings chosen in the world.
        clip: the world's CLIP.
        features: F of Eq. 8; None takes what was chosen in the world, and on real data the
            generator's own autoencoder. The paper's is a CLIP image encoder, of which it does
            not say more: `--features OpenClipFeatures --features.model ViT-B-16
            --features.pretrained openai`.
        configs: folder of the tables' YAML.
        store: results; a run that was broken off goes on from there.
        out: where <table>.json and <table>.md, or <figure>.png and <figure>.md, are written.
        resamples: of the bootstrap.
        quiet: print no progress.

    Returns:
        0, the exit status.
    """
    options = Options(
        table,
        world,
        data or Data(),
        model or Model(),
        rows,
        images,
        noise_seeds,
        background,
        chosen,
        clip,
        features,
        configs,
        store,
        out,
        resamples,
        quiet,
    )
    plan = PaperTable(options)
    if "columns" in plan.plan:
        from g4seg_pl.lab.figures import PaperFigure  # it is made from a PaperTable

        print(PaperFigure(plan).write(out))
        return 0
    made = plan.table()
    made.write(out)
    (out / f"{made.name}.md").write_text(made.markdown(), encoding="utf-8")
    print(made.markdown())
    return 0


def main(words: Sequence[str]) -> int:
    """Run ``g4seg paper table-3 --world``: the table's name comes without a dash.

    Args:
        words: the command line after ``paper``.

    Returns:
        the exit status.
    """
    parser = ArgumentParser(prog="g4seg paper", description=paper.__doc__)
    parser.add_argument("name", help="table-1 to table-9, table-11, or fig-3 to fig-12")
    parser.add_function_arguments(paper, skip={"table"}, as_group=False)
    read = instantiated(parser, parser.parse_args(_with_values(words)))
    arguments = {name: value for name, value in vars(read).items() if name != "name"}
    return paper(read.name, **arguments)


def _with_values(words: Sequence[str]) -> list[str]:
    """The words, with ``true`` after a switch that stands alone, as the parser wants it."""
    following = [*words[1:], ""]
    alone = ("--world", "--quiet")
    return [
        f"{word}=true" if word in alone and after not in ("true", "false") else word
        for word, after in zip(words, following, strict=True)
    ]


class PaperTable:
    """One table: its YAML, expanded to runs.

    Args:
        options: of the command.

    Raises:
        ConfigurationError: there is no such table, or neither world nor data is given.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        path = options.configs / f"{options.table}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in options.configs.glob("*-*.yaml")))
            message = f"no {path}; known tables are {known}"
            raise ConfigurationError(message)
        if not options.world and (options.data.root is None or options.data.seeds is None):
            message = "give --world, or --data.root and --data.seeds (and --model.model)"
            raise ConfigurationError(message)
        self.plan: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        models = Models(options.model.model or GENERATOR, options.clip, options.model.device)
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
        for row in self.plan["rows"]:
            if self.options.rows is None or self.options.rows in row["row"]:
                rows += self._rows(row)
        world = self.options.world
        where = "the embedded world" if world else f"{self.options.data.root}"
        protocol = {
            "measured on": where,
            "generator": str(self.options.model.model or "embedded"),
            "F of Eq. 8": object_text(describe(self.features)),
            "noise seeds": self.options.noise_seeds,
            "settings": "chosen on validation scenes" if world else "configs/paper/ways.yaml",
            "unit": "percent; ± bootstrap standard error over images, gains paired",
        }
        notes = (IN_THE_WORLD if world else ON_DATA, *self.plan.get("notes", ()))
        signed = ("gain",)
        return Table(self.options.table, self.plan["title"], tuple(rows), protocol, notes, signed)

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
        if row.get("by_quality"):
            return self._by_quality(row, source, found)
        head: dict[str, Cell] = {"row": row["row"], "seeds": source.kind}
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
        if len([each for each in self.plan["rows"] if not each.get("needs")]) > 1 and not (
            self.options.rows
        ):
            message = (
                f"data.seeds: this table has several kinds of seeds and there is no {own}; make "
                f"a folder a kind, or choose one by --rows {row['row']!r}"
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
            return ways_of(names, read_ways(WAYS))
        kind: SeedKind = row["world"]
        written = read_ways(WAYS)
        fixed = row.get("as_written", False)
        return [
            ways_of([name], written)[0]
            if fixed or not self.lab.has(kind, name)
            else self.lab.way(kind, name)
            for name in names
        ]

    def _by_quality(
        self, row: Mapping[str, Any], source: Source, found: Mapping[str, Sequence[Scores]]
    ) -> list[dict[str, Cell]]:
        published = row.get("paper", {})
        rows: list[dict[str, Cell]] = []
        for name, runs in found.items():
            if name == "seed":
                continue
            for group in group_rows(self.lab, row["world"], name, found["seed"], runs):
                label = str(group["group"])
                if label.startswith("seed IoU"):
                    rows.append({"row": row["row"], **group, "(P)": published.get(label)})
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
