"""How a run ends that was asked to by SIGTERM, which clusters send before they take a machine."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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


class EndRequest:
    """Whether SIGTERM asked this process to end, for loops whose processes do not run in step.

    Lightning's own handler calls a collective in the middle of a batch. It fails where another
    process is done and gone, and waits for ever in one that is asked twice: by whoever asks all
    processes, and by the process that started it.
    """

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def listen(self, trainer: pl.Trainer) -> Iterator[None]:
        """Handle the signal meanwhile; as before behind it.

        Args:
            trainer: whose processes on this machine, those that it started, are asked too.
        """
        before = self.replace_handler(trainer)
        try:
            yield
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)

    def replace_handler(self, trainer: pl.Trainer) -> Any:
        """Handle the signal from now on; within a run, Lightning takes the handler back itself.

        Args:
            trainer: see `listen`.

        Returns:
            the handler that was there; None if it stays, for handlers belong to the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            return None
        return signal.signal(signal.SIGTERM, lambda number, _: self._note(trainer, number))

    def _note(self, trainer: pl.Trainer, number: int) -> None:
        """Note it, and ask on once."""
        if not self.received and (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(number)
        self.received = True


def wait_for_started(trainer: pl.Trainer, seconds: float) -> None:
    """Wait until the processes that Lightning started from this one have ended.

    Where the first process of a machine is gone, clusters take the machine, and the batch that is
    still in work with it.

    Args:
        trainer: which started them, or none.
        seconds: to wait at most for each.
    """
    for process in getattr(trainer.strategy.launcher, "procs", ()):
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


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
