"""What the benchmark finds: one row a question, with the bar it is held against."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from g4seg_pl.callbacks.run_record import write_text_atomically


@dataclass(frozen=True)
class Bar:
    """What a value must reach.

    Attributes:
        limit: in the row's unit.
        at_least: whether the value must not be below it; otherwise not above it.
    """

    limit: float
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value passes; one that is not a number does not."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        """As it stands in a table."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    """One line of the benchmark.

    Attributes:
        name: what was measured; the part of the benchmark, a colon, and the quantity.
        value: None if this machine cannot measure it; ``detail`` says why.
        unit: of the value; ``×`` for ratios.
        bar: None where no bar is set for this size and machine.
        detail: how it came about.
    """

    name: str
    value: float | None
    unit: str
    bar: Bar | None = None
    detail: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the bar holds; None without a bar or a value."""
        if self.bar is None or self.value is None:
            return None
        return self.bar.holds(self.value)

    def as_json(self) -> dict[str, object]:
        """The row in terms of JSON."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "bar": None if self.bar is None else str(self.bar),
            "ok": self.ok,
            "detail": self.detail,
        }


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write ``{"rows": [...]}``; never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"rows": [row.as_json() for row in rows]}
    write_text_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | value | bar | |", "|---|---|---|---|"]
    for row in rows:
        value = "not measured" if row.value is None else f"{row.value:.4g} {row.unit}"
        verdict = {True: "ok", False: "**fails**", None: ""}[row.ok]
        lines.append(f"| {row.name} | {value} | {row.bar or ''} | {verdict} |")
    notes = [f"- {row.name}: {row.detail}" for row in rows if row.detail]
    return "\n".join([*lines, "", *notes])


def failing(rows: Sequence[Row]) -> list[str]:
    """The names of the rows whose bar does not hold."""
    return [row.name for row in rows if row.ok is False]
