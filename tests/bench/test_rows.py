"""Rows, bars, pairs and memory against what can be counted by hand."""

import json
from pathlib import Path

import pytest
import torch

from g4seg_pl.bench.allocation import peak_allocated
from g4seg_pl.bench.rows import Bar, Row, failing, table, write_rows
from g4seg_pl.bench.timing import Spent, interleaved, ratio

CPU = torch.device("cpu")
ROWS = [
    Row("a: fast", 1.05, "×", Bar(1.1), "ten pairs"),
    Row("a: slow", 3.0, "×", Bar(4, at_least=True)),
    Row("b: open", 7.0, "ms"),
    Row("b: elsewhere", None, "×", Bar(1.8, at_least=True), "needs two cores"),
]


def test_rows_say_which_bars_hold(tmp_path: Path) -> None:
    write_rows(tmp_path / "new" / "rows.json", ROWS)
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())["rows"]
    assert [row["ok"] for row in rows] == [True, False, None, None]
    assert rows[0] == {
        "name": "a: fast",
        "value": 1.05,
        "unit": "×",
        "bar": "≤ 1.1",
        "ok": True,
        "detail": "ten pairs",
    }
    assert failing(ROWS) == ["a: slow"]
    assert "| a: slow | 3 × | ≥ 4 | **fails** |" in table(ROWS)


def test_a_value_that_is_not_a_number_fails_its_bar() -> None:
    assert not Bar(1).holds(float("nan"))
    assert not Bar(1, at_least=True).holds(float("nan"))


def test_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    over = [Spent(2, 9), Spent(30, 9), Spent(3, 9)]
    under = [Spent(1, 9), Spent(10, 9), Spent(30, 9)]
    assert ratio(over, under) == 2


def test_contestants_take_turns_and_each_is_warmed_up() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    spent = interleaved(runs, 3, CPU)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in spent.items()} == {"a": 3, "b": 3, "c": 3}


def test_single_threads_are_timed_by_the_processor() -> None:
    assert Spent(5.0, 2.0, "processor").seconds == 2.0
    assert Spent(5.0, 2.0, "wall").seconds == 5.0


def test_peak_is_what_lies_in_memory_at_once() -> None:
    def run() -> None:
        first = torch.empty(1_000_000, dtype=torch.float32)
        del first
        second = torch.empty(500_000, dtype=torch.float32)
        third = torch.empty(750_000, dtype=torch.float32)
        del second, third

    assert peak_allocated(run, CPU) == pytest.approx(5_000_000, abs=1000)
