"""Tables: rows of named values, printed as Markdown and kept as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from g4seg_pl.callbacks.run_record import Json, write_text_atomically
from g4seg_pl.lab.scores import Line

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table with what is needed to read it.

    Attributes:
        name: of its file.
        title: one line.
        rows: each a value by column; a column that ends in ``_se`` is the standard error of the
            one without, and is printed beside it.
        protocol: split, count, background rule and where its constant was chosen, and so on.
        notes: sentences below the table.
        signed: columns printed with their sign.
    """

    name: str
    title: str
    rows: tuple[Mapping[str, Cell], ...]
    protocol: Mapping[str, Json]
    notes: tuple[str, ...] = ()
    signed: tuple[str, ...] = ("gain",)

    def markdown(self) -> str:
        """Title, protocol, table and notes."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        columns = [name for name in names if not _is_error(name, names)]
        lines = [f"### {self.title}", "", _protocol_text(self.protocol), ""]
        lines += [_line(columns), _line(["---"] * len(columns))]
        lines += [_line([self._cell(row, column) for column in columns]) for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def json(self) -> Json:
        """Everything."""
        return asdict(self) | {"rows": [dict(row) for row in self.rows]}

    def write(self, folder: Path) -> None:
        """Write ``<name>.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.json(), indent=1, ensure_ascii=False)
        write_text_atomically(folder / f"{self.name}.json", text + "\n")

    def _cell(self, row: Mapping[str, Cell], column: str) -> str:
        value = row.get(column)
        error = row.get(f"{column}_se")
        sign = "+" if column.startswith(self.signed) else ""
        if isinstance(value, float) and isinstance(error, float):
            return f"{value:{sign}.2f} ± {error:.2f}"
        if isinstance(value, float):
            digits = 4 if abs(value) < 0.1 and value and not sign else 2
            return f"{value:{sign}.{digits}f}"
        return "" if value is None else str(value)


def read_table(path: Path) -> Table:
    """Read ``<name>.json``."""
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in ("rows", "notes", "signed"):
        read[name] = tuple(read[name])
    return Table(**read)


def line_row(line: Line, **more: Cell) -> dict[str, Cell]:
    """A row of scores.

    Args:
        line: the scores.
        more: put before them.
    """
    return {
        **more,
        "way": line.way,
        "mIoU": line.miou,
        "boundary IoU": line.boundary_iou,
        "gain": line.gain,
        "gain_se": line.gain_se,
        "sd over noise": line.seed_spread,
        "s/mask": line.seconds,
    }


def _is_error(name: str, names: Sequence[str]) -> bool:
    return name.endswith("_se") and name.removesuffix("_se") in names


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _protocol_text(protocol: Mapping[str, Json]) -> str:
    return "; ".join(f"{name}: {_plain(value)}" for name, value in protocol.items())


def _plain(value: Json) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(each) for each in value)
    return str(value)
