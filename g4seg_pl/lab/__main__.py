"""The laboratory of the embedded world: ``python -m g4seg_pl.lab choose|cam|report|<table>``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from g4seg_pl.lab.cache import Store
from g4seg_pl.lab.cam_weights import CamRecipe, cam_weights
from g4seg_pl.lab.choose import GRID, choose
from g4seg_pl.lab.laboratory import CHOSEN, MAIN_KINDS, Lab
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.pictures import failures
from g4seg_pl.lab.report import write_report
from g4seg_pl.lab.signal_pictures import signal_pictures
from g4seg_pl.lab.sources import SEED_KINDS, SeedKind
from g4seg_pl.lab.table import Table
from g4seg_pl.lab.tables.decoders import decoders
from g4seg_pl.lab.tables.explanation import claim
from g4seg_pl.lab.tables.groups import groups
from g4seg_pl.lab.tables.judging import likelihood
from g4seg_pl.lab.tables.makers import makers
from g4seg_pl.lab.tables.refinement import (
    controls,
    costs,
    modules,
    refiners,
    sensitivity,
    signals,
)
from g4seg_pl.lab.tables.words import open_vocabulary, words
from g4seg_pl.types import G4SegError, check_counts
from g4seg_pl.world.folders import CLIP, GENERATOR, TINY_DECODER

TABLES: dict[str, Callable[[Lab], Table]] = {
    "claim": claim,
    "modules": modules,
    "sensitivity": sensitivity,
    "groups": groups,
    "refiners": refiners,
    "signals": signals,
    "controls": controls,
    "makers": makers,
    "words": words,
    "likelihood": likelihood,
    "open_vocabulary": open_vocabulary,
    "decoders": decoders,
    "costs": costs,
}
# `cam` trains the classifier that `makers` would train itself, beside what needs none.
OTHERS = ("choose", "cam", "all", "report", "failures", "signal_pictures")
SIGNAL_PICTURES = CHOSEN.parents[1] / "signals"


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(prog="python -m g4seg_pl.lab", description=__doc__)
    made.add_argument("what", nargs="+", choices=[*OTHERS, *TABLES], metavar="what")
    made.add_argument("--generator", default=str(GENERATOR), help="a diffusers folder")
    made.add_argument("--clip", type=Path, default=CLIP, help="an open_clip folder")
    made.add_argument("--store", type=Path, default=Path("outputs/lab"), help="results, resumable")
    made.add_argument("--results", type=Path, default=CHOSEN.parent, help="tables as JSON")
    made.add_argument("--grid", type=Path, default=GRID, help="what `choose` tries")
    made.add_argument("--images", type=int, default=300, help="test scenes")
    made.add_argument("--first", type=int, default=0, help="first test scene")
    made.add_argument("--val-images", type=int, default=None, help="instead of the grid's")
    made.add_argument("--noise-seeds", type=int, default=3)
    made.add_argument("--kinds", nargs="+", choices=SEED_KINDS, default=MAIN_KINDS)
    made.add_argument("--only", nargs="+", default=None, help="ways to choose anew")
    made.add_argument("--checkpoints", nargs="+", type=Path, default=(), help="for `words`")
    made.add_argument("--decoder", type=Path, default=TINY_DECODER, help="for `decoders`")
    made.add_argument("--pictures", type=Path, default=SIGNAL_PICTURES, help="of `signal_pictures`")
    made.add_argument("--resamples", type=int, default=1000)
    made.add_argument("--quiet", action="store_true")
    return made


def make_lab(options: argparse.Namespace) -> Lab:
    """The lab that the arguments describe.

    Raises:
        ConfigurationError: nothing is to be measured.
    """
    check_counts(1, images=options.images, noise_seeds=options.noise_seeds)
    check_counts(2, resamples=options.resamples)
    return Lab(
        Models(options.generator, options.clip),
        Store(options.store),
        options.results,
        options.results / "chosen.json",
        options.images,
        options.first,
        tuple(range(options.noise_seeds)),
        cast(tuple[SeedKind, ...], tuple(options.kinds)),
        options.resamples,
        options.quiet,
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run what is asked for, in order."""
    options = parser().parse_args(args)
    wanted = (
        ["choose", *TABLES, "failures", "signal_pictures", "report"]
        if "all" in options.what
        else options.what
    )
    try:
        lab = make_lab(options)
        for name in wanted:
            _run(name, lab, options)
    except G4SegError as error:
        print(f"lab: error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(name: str, lab: Lab, options: argparse.Namespace) -> None:
    match name:
        case "choose":
            choose(lab, options.grid, options.kinds, options.val_images, options.only)
        case "cam":
            print(cam_weights(lab.store, CamRecipe(), quiet=lab.quiet))
        case "report":
            print(write_report(lab.results))
        case "failures":
            print(failures(lab, options.results))
        case "signal_pictures":
            print(signal_pictures(lab, options.pictures))
        case "words":
            _write(words(lab, options.checkpoints), lab)
        case "decoders":
            _write(decoders(lab, options.decoder), lab)
        case _:
            _write(TABLES[name](lab), lab)


def _write(table: Table, lab: Lab) -> None:
    table.write(lab.results)
    print(table.markdown(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
