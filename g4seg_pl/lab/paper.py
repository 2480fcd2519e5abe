"""``g4seg paper``: the paper's tables, its figures (P) beside measured ones."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from g4seg_pl.core.background import PowerBackground, Threshold
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.lab.figures import PaperFigure
from g4seg_pl.lab.laboratory import CHOSEN
from g4seg_pl.lab.paper_table import CONFIGS, Data, Model, Options, PaperTable
from g4seg_pl.lab.written import instantiated
from g4seg_pl.types import check_counts
from g4seg_pl.world.folders import CLIP


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
        data: real data: --data.root, --data.seeds, --data.split, --data.dialect,
            --data.seed_options.
        model: the generator: --model.model, --model.device, --model.masks_per_pass.
        rows: only rows whose label holds this text.
        images: at most so many of each row; in the world 300, of real data all; a figure
            chooses among its first 24.
        noise_seeds: how many.
        background: the seeds' rule on real data; the row's own if None.
        chosen: settings chosen in the world.
        clip: the world's CLIP.
        features: F of Eq. 8; None takes what was chosen in the world, and on real data the
            generator's own autoencoder. The paper's is a CLIP image encoder, of which it does
            not say more: `--features OpenClipFeatures --features.model ViT-B-16-quickgelu
            --features.pretrained openai`.
        configs: folder of the tables' YAML.
        store: results; a run that was broken off goes on from there.
        out: where <table>.json and <table>.md, or <figure>.png and <figure>.md, are written.
        resamples: of the bootstrap.
        quiet: print no progress.

    Returns:
        the exit status: 1 if images had to be left out of a table.
    """
    check_counts(1, images=1 if images is None else images, noise_seeds=noise_seeds)
    check_counts(2, resamples=resamples)
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
        print(PaperFigure(plan).write(out))
        return 0
    made = plan.table()
    made.write(out)
    (out / f"{made.name}.md").write_text(made.markdown(), encoding="utf-8")
    print(made.markdown())
    return 0 if plan.complete else 1


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
