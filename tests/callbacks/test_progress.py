"""Progress in images: the line's arithmetic, and what a log file gets to see."""

from types import SimpleNamespace
from typing import Any

import pytest

from g4seg_pl.callbacks.progress import ImageProgress, format_duration, format_progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (61.4, "01:01"), (3723, "1:02:03"), (90_061, "1 d 1:01:01")],
)
def test_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("done", "total", "seconds", "text"),
    [
        (0, 10, 0.0, "0/10 images, 0.00 images/s, --:-- left"),
        (20, 80, 10.0, "20/80 images, 2.00 images/s, 00:30 left"),
        (2, 5, 240.0, "2/5 images, 120.00 s/image, 06:00 left"),
        (5, 5, 1.0, "5/5 images, 5.00 images/s, 00:00 left"),
        (3, None, 1.0, "3 images, 3.00 images/s"),
    ],
)
def test_line(done: int, total: int | None, seconds: float, text: str) -> None:
    assert format_progress(done, total, seconds) == text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("time.monotonic", lambda: now.seconds)
    return now


def watch(progress: ImageProgress, clock: Any, stage: str) -> None:
    """Three batches of two images, ten seconds each."""
    loader = SimpleNamespace(sampler=range(6))
    trainer: Any = SimpleNamespace(predict_dataloaders=loader, test_dataloaders=loader)
    getattr(progress, f"on_{stage}_start")(trainer, None)
    for _ in range(3):
        clock.seconds += 10
        getattr(progress, f"on_{stage}_batch_end")(trainer, None, None, ["a", "b"], 0)
    getattr(progress, f"on_{stage}_end")(trainer, None)


@pytest.mark.parametrize("stage", ["predict", "test"])
def test_log_file_gets_a_line_now_and_then(
    stage: str, clock: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    watch(ImageProgress(log_every=15), clock, stage)
    assert capsys.readouterr().err.splitlines() == [
        "4/6 images, 5.00 s/image, 00:10 left",
        "6/6 images, 5.00 s/image, 00:00 left",
    ]


def test_other_ranks_print_nothing(clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    progress = ImageProgress(log_every=0)
    progress.disable()
    watch(progress, clock, "predict")
    assert capsys.readouterr().err == ""


def test_line_on_a_terminal_is_rewritten_in_place(
    clock: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    watch(ImageProgress(), clock, "predict")
    written = capsys.readouterr().err
    assert written.count("\r") == 4
    assert written.endswith("00:00 left\n")
    assert written.count("\n") == 1
