"""How a run ends that was asked to by SIGTERM, which clusters send before they take a machine."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

TERMINATED = 128 + signal.SIGTERM
"""The exit status of a process that SIGTERM ended."""


def status_of_end(trainer: pl.Trainer) -> int:
    """The exit status of this process of a run that SIGTERM ended.

    Returns:
        143, which tells that the run is not finished; 0 in a process that Lightning itself started
        beside the first one of a machine. Lightning takes any other status of such a process for
        a crash, and kills all that are still in the middle of their batch.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    watched = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
    return 0 if watched else TERMINATED


@contextmanager
def told_by_status(trainer: pl.Trainer, advice: Callable[[], str]) -> Iterator[None]:
    """Let a run that SIGTERM ends within say so: Lightning would end it as if it were finished.

    Args:
        trainer: which runs.
        advice: what to do now, asked for when the run has ended.

    Raises:
        SystemExit: the run was ended; see `status_of_end`.
    """
    try:
        yield
    except SIGTERMException as error:
        if trainer.is_global_zero:
            print(f"ended by SIGTERM; {advice()}", file=sys.stderr, flush=True)
        raise SystemExit(status_of_end(trainer)) from error


BEGINS_ANEW = "nothing of it is kept: the same command begins anew"


def how_to_go_on(checkpoint: Path) -> str:
    """What to do about a training that was ended.

    Args:
        checkpoint: the file that each epoch replaces.
    """
    if checkpoint.is_file():
        return f"the same command with --ckpt_path last goes on from {checkpoint}"
    return BEGINS_ANEW
