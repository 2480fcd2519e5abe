"""``g4seg compare``: chains of refiners side by side, in one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from g4seg_pl.core.background import BackgroundRule, PowerBackground, Threshold
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab.cache import Store
from g4seg_pl.lab.cost import cost_of
from g4seg_pl.lab.laboratory import CHOSEN, REPOSITORY, Lab
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.runner import Runner
from g4seg_pl.lab.scores import line
from g4seg_pl.lab.sources import DataSource, SeedKind, Source
from g4seg_pl.lab.stages import Way
from g4seg_pl.lab.table import Cell, Table, line_row
from g4seg_pl.lab.written import build_stages
from g4seg_pl.types import ConfigurationError, check_counts
from g4seg_pl.world.folders import CLIP, GENERATOR

if TYPE_CHECKING:
    from datamodules.base import SeedDataModule

WAYS = REPOSITORY / "configs" / "paper" / "ways.yaml"
SIDE_BY_SIDE = (
    "g4seg,dcrf,g4seg+dcrf,dcrf+g4seg,best,best+dcrf,blur,feature-nn,no-injection,noise-only,"
    "guided,random-walk,affinity,gradient"
)
COST_IMAGES = 8
# Masks that enter a network at once.
IN_THE_WORLD, ON_DATA = 32, 8


def read_ways(path: Path) -> dict[str, list[Any]]:
    """Read stages by name from YAML.

    Raises:
        ConfigurationError: there is no such file, or it is no mapping of lists.
    """
    if not path.is_file():
        message = f"ways_file: no {path}; give a YAML file with a list of stages by name"
        raise ConfigurationError(message)
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(read, dict) or not all(isinstance(each, list) for each in read.values()):
        message = f"ways_file: {path} must hold a list of stages by name"
        raise ConfigurationError(message)
    return read


def ways_of(names: Sequence[str], stages: dict[str, list[Any]]) -> list[Way]:
    """Return ways and chains of them (``a+b``) from stages by name.

    Raises:
        ConfigurationError: a name is not there.
    """
    ways = []
    for name in names:
        parts = [name] if name in stages else name.split("+")
        missing = [part for part in parts if part not in stages]
        if missing:
            message = f"ways: no {missing[0]!r}; known are {', '.join(stages)}"
            raise ConfigurationError(message)
        ways.append(Way(name, build_stages([each for part in parts for each in stages[part]])))
    return ways


def table_of(
    name: str,
    source: Source,
    ways: Sequence[Way],
    runner: Runner,
    background: BackgroundRule,
    noise_seeds: Sequence[int],
    resamples: int,
    *,
    costs: bool = True,
) -> Table:
    """Return ways side by side on a source, the seed first.

    Args:
        name: of the table.
        source: images with seeds and truth.
        ways: to be compared.
        runner: models and store.
        background: the seeds' rule.
        noise_seeds: at least one.
        resamples: of the bootstrap.
        costs: measure seconds and memory of each way from nothing too.
    """
    every = [Way("seed"), *(way for way in ways if way.name != "seed")]
    found = runner.run(every, source, background, noise_seeds)
    rows: list[dict[str, Cell]] = []
    samples = [s for s in source.samples(source.ids[:COST_IMAGES]) if s.class_names]
    for way in every:
        row = line_row(line(way.name, found["seed"], found[way.name], resamples))
        del row["s/mask"]
        if costs and samples:
            cost = cost_of(way, runner.models.refiner(runner.features), samples, background)
            row |= {"s/mask": cost.seconds, f"MB, {len(samples)} images at once": cost.megabytes}
        rows.append(row)
    protocol = {
        "images": len(found["seed"][0].ids),
        "split": source.split,
        "seeds": source.kind,
        "noise seeds": len(noise_seeds),
        "background": repr(background),
        "crf": "as the row says",
        "truth 255": "ignored",
        "unit": "percent; gain over the seed ± bootstrap standard error over images, paired",
    }
    return Table(name, f"Refiners side by side: {source.kind}", tuple(rows), protocol)


def compare(
    ways: str = SIDE_BY_SIDE,
    kind: SeedKind = "gradcam",
    images: int = 300,
    first: int = 0,
    noise_seeds: int = 3,
    data: "SeedDataModule | None" = None,
    background: Threshold | PowerBackground | None = None,
    model: str | None = None,
    masks_per_pass: int | None = None,
    ways_file: Path | None = None,
    chosen: Path = CHOSEN,
    clip: Path = CLIP,
    store: Path = Path("outputs/lab"),
    out: Path = Path("outputs/compare"),
    resamples: int = 1000,
) -> int:
    """Compare ways to refine, and chains of them, on the same images.

    In the embedded world, settings are those chosen on its validation scenes. With `data`, they
    are those of `ways_file`, and nothing is chosen.

    Args:
        ways: names separated by commas; `a+b` runs b on what a leaves.
        kind: of the seeds, in the embedded world.
        images: how many; of a data module, all of them if there are fewer.
        first: index of the first test scene.
        noise_seeds: how many.
        data: a data module with seeds and truth, by class path; None for the embedded world.
        background: the seeds' rule, with `data`.
        model: a diffusers folder or hub id; the embedded generator if None.
        masks_per_pass: masks that enter a network at once, the bound on memory; None for 8 with
            `data`, 32 of the embedded world's small ones.
        ways_file: YAML with a list of stages by name; configs/paper/ways.yaml with `data`.
        chosen: what was chosen in the embedded world.
        clip: the world's CLIP.
        store: results; a run that was broken off goes on from there.
        out: where table.md and compare.json are written.
        resamples: of the bootstrap.

    Returns:
        the exit status: 1 if images had to be left out.
    """
    check_counts(1, images=images, noise_seeds=noise_seeds)
    check_counts(2, resamples=resamples)
    passes = masks_per_pass or (IN_THE_WORLD if data is None else ON_DATA)
    check_counts(1, masks_per_pass=passes)
    models = Models(model or GENERATOR, clip, masks_per_pass=passes)
    lab = Lab(models, Store(store), chosen_file=chosen, images=images, first=first, quiet=False)
    names = [name for name in ways.split(",") if name and name != "seed"]
    source: Source
    rule: BackgroundRule
    if data is None:
        if background is not None:
            message = "background: the world's seeds have chosen thresholds; give it with data"
            raise ConfigurationError(message)
        runner = lab.runner()
        source, rule = lab.source(kind), lab.background(kind)
        if ways_file is None:
            compared = [lab.way(kind, name) for name in names]
        else:
            compared = ways_of(names, read_ways(ways_file))
    else:
        # What was chosen in the world, F of Eq. 8 among it, holds there.
        runner = lab.runner(VAEFeatures())
        source, rule = DataSource(data, "files", images), background or Threshold()
        compared = ways_of(names, read_ways(ways_file or WAYS))
    made = table_of("compare", source, compared, runner, rule, range(noise_seeds), resamples)
    made.write(out)
    (out / "table.md").write_text(made.markdown(), encoding="utf-8")
    print(made.markdown())
    # Images that could not be used were named when they were read.
    return int(len(source.ids) > int(str(made.protocol["images"])))
