"""One process at a time decides about an output folder that several runs share."""

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from g4seg_pl.types import ConfigurationError

POLL_SECONDS = 0.05
PATIENCE = 300.0
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
