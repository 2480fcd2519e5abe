"""``python -m g4seg_pl.segmentation.loop``: the loop in one command that may be killed at any time.

Labels are made once, a chunk of scenes at a time; trainings go on where they stopped; what is
finished is skipped. Results are named by what determines them, so that other weights or settings
never meet old labels.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from g4seg_pl.callbacks.crf import require_crf
from g4seg_pl.segmentation.loop.labels import chunks, make_labels, write_tree
from g4seg_pl.segmentation.loop.plan import ROWS, SCALES, Places, RowName, Training
from g4seg_pl.segmentation.loop.report import write_report
from g4seg_pl.segmentation.loop.training import Job, train
from g4seg_pl.types import G4SegError

Task = TypeVar("Task")
Result = TypeVar("Result")

ROOT = Path("outputs/loop")
RESULTS = Path("docs/results")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the loop.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        0; 1 if something asked for cannot be done.
    """
    parser = argparse.ArgumentParser(
        prog="python -m g4seg_pl.segmentation.loop",
        description="Train the small DeepLab on seeds, g4seg and truth; kill and repeat at will.",
    )
    parser.add_argument("--scale", choices=SCALES, default="full", help="full, or a miniature")
    parser.add_argument("--processes", type=int, default=1, help="one thread each")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="only these")
    parser.add_argument("--repeats", type=int, help="training seeds a row, if fewer than usual")
    parser.add_argument("--out", type=Path, default=ROOT, help="labels, checkpoints and logs")
    parser.add_argument(
        "--results", type=Path, help=f"of loop.json and loop.md: {RESULTS} for the whole loop"
    )
    options = parser.parse_args(argv)
    if options.processes < 1 or (options.repeats is not None and options.repeats < 1):
        parser.error("--processes and --repeats: give 1 or more")
    try:
        print(loop(options))
    except G4SegError as error:
        print(f"loop: error: {error}", file=sys.stderr)
        return 1
    return 0


def loop(options: argparse.Namespace) -> str:
    """Make what is missing and write the table; returns it as Markdown.

    Raises:
        G4SegError: something asked for cannot be done.
    """
    scale = SCALES[options.scale]
    rows: tuple[RowName, ...] = tuple(row for row in ROWS if row in options.rows)
    if any(row.endswith("+crf") for row in rows):
        require_crf()
    places = Places(options.out, scale)
    repeats = min(options.repeats or scale.repeats, scale.repeats)
    write_tree(places)
    for count in _progress(make_labels, chunks(places, rows), options.processes):
        print(f"labels of {count} scenes", flush=True)
    # Seed by seed, so that a loop that is stopped early has compared all rows.
    jobs = [Job(places, Training(row, seed)) for seed in range(repeats) for row in rows]
    for result in _progress(train, jobs, options.processes):
        print(f"{result['row']}, seed {result['seed']}: mIoU {result['miou']:.2f}", flush=True)
    results = [train(Job(places, Training(row, seed))) for row in rows for seed in range(repeats)]
    whole = options.scale == "full" and rows == ROWS and repeats == scale.repeats
    out = options.results or (RESULTS if whole else options.out / "results")
    return write_report(places, results, options.scale, out)


def _progress(
    work: Callable[[Task], Result], tasks: Sequence[Task], processes: int
) -> Iterator[Result]:
    """Do the tasks in some order, each process with one thread."""
    began = time.perf_counter()
    for number, result in enumerate(_results(work, tasks, processes), start=1):
        seconds = time.perf_counter() - began
        print(f"[{number}/{len(tasks)}, {seconds:.0f} s] ", end="", flush=True)
        yield result


def _results(
    work: Callable[[Task], Result], tasks: Sequence[Task], processes: int
) -> Iterator[Result]:
    if processes == 1 or len(tasks) < 2:
        # One thread also here: results then do not depend on the number of processes.
        torch.set_num_threads(1)
        yield from map(work, tasks)
        return
    # Not forked: a forked process would inherit every thread's locks.
    context = get_context("spawn")
    with ProcessPoolExecutor(
        processes, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for finished in as_completed(futures):
                yield finished.result()
        finally:  # after an error or Ctrl-C, what has not begun does not begin
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
