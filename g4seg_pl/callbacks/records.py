"""What became of each image: JSON lines, one file a process."""

import json
import os
import threading
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from g4seg_pl.types import G4SegError


class RecordFile:
    """Append-only JSON lines of one process; every line is on disk when `add` returns.

    Safe to use from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        # The last line of a killed process may be cut short; the next begins on its own.
        with path.open("ab+") as file:
            if (
                file.seek(0, os.SEEK_END)
                and file.seek(-1, os.SEEK_END) + 1
                and file.read() != b"\n"
            ):
                file.write(b"\n")

    def add(self, image_id: str, error: str | None = None, **details: Any) -> None:
        """Append the record of one image, see `write`; ``error`` makes it a failure."""
        self.write(new_record(image_id, error, **details))

    def write(self, record: dict[str, Any]) -> None:
        """Append a record.

        Raises:
            G4SegError: the disk refuses.
        """
        line = json.dumps(record)
        try:
            with self._lock, self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            msg = f"the record of {record['id']}: {self.path} cannot be written: {error}"
            raise G4SegError(msg) from error


def new_record(image_id: str, error: str | None = None, **details: Any) -> dict[str, Any]:
    """The record of one image at this moment; ``error`` makes it a failure."""
    status = {"status": "failed", "error": error} if error else {"status": "done"}
    moment = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"id": image_id, **status, **details, "time": moment}


def read_records(root: Path) -> Iterator[dict[str, Any]]:
    """Every record of a folder, of all its processes and runs, in order of time."""
    yield from sorted(_stored_records(root), key=lambda record: str(record["time"]))


def last_records(root: Path, ids: Collection[str]) -> dict[str, dict[str, Any]]:
    """The last record of each of some images; no others are kept in memory."""
    last: dict[str, dict[str, Any]] = {}
    for record in _stored_records(root) if ids else ():
        known = last.get(record["id"], record)
        if record["id"] in ids and str(record["time"]) >= str(known["time"]):
            last[record["id"]] = record
    return last


def _stored_records(root: Path) -> Iterator[dict[str, Any]]:
    """The records file by file."""
    for path in root.glob("records.*.jsonl"):
        with path.open(encoding="utf-8") as lines:
            yield from (record for line in lines if (record := _parsed(line)) is not None)


def _parsed(line: str) -> dict[str, Any] | None:
    """One record; None for the last line of a killed process, which may be cut short."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"id", "time"} <= record.keys() else None
