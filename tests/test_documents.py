"""Every command that the documents and the configurations' headers write is understood."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from command_line import REPOSITORY

from g4seg_pl.main import main

FILES = [
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "configs").rglob("*.yaml")),
]
# These print what they have understood and stop, before anything is loaded.
COMMAND = re.compile(r"g4seg (predict|test|fit|train) ")


def commands(path: Path) -> Iterator[ParameterSet]:
    """The arguments of commands with lines of their own, their placeholders filled in."""
    whole = re.sub(r"\\\n[# ]*", "", path.read_text(encoding="utf-8"))
    for line in whole.splitlines():
        text = line.lstrip("# ")
        # An ellipsis stands for what only the reader knows.
        if not COMMAND.match(text) or "…" in text:
            continue
        filled = re.sub(r"<[^>]*>|\.\.\.", "somewhere", text)
        words = shlex.split(filled, comments=True)[1:]
        yield pytest.param(words, id=f"{path.name}: {' '.join(words)}")


@pytest.mark.parametrize("words", [each for path in FILES for each in commands(path)])
def test_a_written_command_is_understood(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*words, "--print_config"])
    assert "class_path" in capsys.readouterr().out
