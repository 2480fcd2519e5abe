"""One process at a time decides about a shared output folder, and makes one part of its masks."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

from g4seg_pl.types import ConfigurationError

POLL_SECONDS = 0.05
PATIENCE = 300.0
HANDOVER = 10.0
"""Seconds in which a process that was told to end may still be writing its last files."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def folder_lock(root: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the lock of a folder; the system gives it back when a process dies.

    Where the file system has no locks this is said, and the caller goes on without.

    Args:
        root: the folder, which exists.
        patience: seconds to wait for other holders, who keep it for a moment only.

    Raises:
        ConfigurationError: another process kept it for longer than that.
    """
    with (root / ".lock").open("a") as file:
        deadline = time.monotonic() + patience
        while not _locked(file):
            if time.monotonic() > deadline:
                msg = (
                    f"out {root}: another run has held its lock (.lock) for {patience:.0f} s: end "
                    "that run, or use another out"
                )
                raise ConfigurationError(msg)
            time.sleep(POLL_SECONDS)
        yield


def _locked(file: IO[str]) -> bool:
    """Try to lock; closing the file unlocks it. True also where there are no locks."""
    locked = try_lock(file)
    if locked is None:
        print(
            "note: this file system has no locks; start runs that share a folder one by one",
            file=sys.stderr,
        )
    return locked is not False


class ProcessLock:
    """Keeps a second process off what one process makes, from its setup to its end.

    Processes forked meanwhile do not hold it: workers outlive a killed process by seconds.

    Args:
        path: of the file that is locked; its folder exists. It remains.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def take(self, patience: float | None = None) -> bool:
        """Take the lock.

        Args:
            patience: seconds to wait for another holder, `HANDOVER` if None.

        Returns:
            whether it is held now; true also where the file system has no locks.
        """
        deadline = time.monotonic() + (HANDOVER if patience is None else patience)
        file = self.path.open("a")
        while try_lock(file) is False:
            if time.monotonic() >= deadline:
                file.close()
                return False
            time.sleep(POLL_SECONDS)
        self._file = file
        _HELD.add(self)
        return True

    def release(self) -> None:
        """Give it back, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None


_HELD: WeakSet[ProcessLock] = WeakSet()


def _let_go_in_child() -> None:
    """Close what a forked process inherits; its parent's lock stays."""
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing is forked
    os.register_at_fork(after_in_child=_let_go_in_child)


def try_lock(file: IO[Any]) -> bool | None:
    """Lock an open file for this process, until it is closed, without waiting.

    Returns:
        whether it is locked now; None where the file system has no locks.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        return None
    return True
