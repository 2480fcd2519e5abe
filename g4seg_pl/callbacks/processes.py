"""How the processes of one run tell each other, by files, that they have written all they had.

Files and not a barrier: processes may finish hours apart, and collectives time out.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from g4seg_pl.callbacks.folder_lock import ProcessLock

POLL_SECONDS = 0.2
_FAILED = "failed"


@dataclass(frozen=True)
class ProcessFiles:
    """The files that tell about the processes of one run.

    Attributes:
        root: output folder of the run.
        shard: ``i/n`` if the run is over a part of the data; runs over other parts may write
            into the same folder at the same time.
    """

    root: Path
    shard: str | None = None

    def name(self, rank: int) -> str:
        """The name of a process, by rank and shard."""
        return f"{self._part}rank{rank}"

    def record(self, rank: int) -> Path:
        """The record file of a process; it grows with every image."""
        return self.root / f"records.{self.name(rank)}.jsonl"

    def lock(self, rank: int) -> ProcessLock:
        """What keeps a second process of this name out of the folder."""
        return ProcessLock(self.root / f".lock.{self.name(rank)}")

    def marker(self, rank: int) -> Path:
        """The file by which a process says that it has written all it will."""
        return self.root / f".finished.{self.name(rank)}"

    def begin(self, rank: int) -> None:
        """Take back what an earlier run said; to be called before a barrier that all pass."""
        self.marker(rank).unlink(missing_ok=True)

    def finish(self, rank: int, *, failed: bool = False) -> None:
        """Say that this process will write no more, because it is done or because it failed."""
        self.marker(rank).write_text(_FAILED if failed else "", encoding="utf-8")

    def wait(
        self, processes: int, patience: float, stop: Callable[[], bool] = lambda: False
    ) -> tuple[int, ...]:
        """Wait until every process has said that it is finished, then remove the markers.

        Args:
            processes: how many there are.
            patience: seconds without a new record of any process after which those that have not
                finished are given up: they died, or hang. A slow one is waited for.
            stop: whether to give up all at once.

        Returns:
            the ranks given up or failed; none if all is well.
        """
        seen, since = self._signs(processes), time.monotonic()
        while missing := self._unfinished(processes):
            signs = self._signs(processes)
            if signs != seen:
                seen, since = signs, time.monotonic()
            if stop() or time.monotonic() - since > patience:
                break
            time.sleep(POLL_SECONDS)
        failed = [rank for rank in range(processes) if self._has_failed(rank)]
        for rank in range(processes):
            self.marker(rank).unlink(missing_ok=True)
        return tuple(sorted({*missing, *failed}))

    def _unfinished(self, processes: int) -> tuple[int, ...]:
        """The ranks without a marker."""
        return tuple(rank for rank in range(processes) if not self.marker(rank).exists())

    def _has_failed(self, rank: int) -> bool:
        """Whether a process's marker says so."""
        marker = self.marker(rank)
        return marker.exists() and marker.read_text(encoding="utf-8") == _FAILED

    def _signs(self, processes: int) -> list[int]:
        """What changes while a process works: sizes of the records, -1 where there is none."""
        paths = [self.record(rank) for rank in range(processes)]
        return [path.stat().st_size if path.exists() else -1 for path in paths]

    @property
    def _part(self) -> str:
        """Part of the names, for a run over a part of the data."""
        return f"shard{self.shard.replace('/', 'of')}." if self.shard else ""
