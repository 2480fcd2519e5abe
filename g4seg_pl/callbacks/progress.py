"""Progress in images: how many a second, and the time left."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

SECONDS_IN_A_DAY = 86_400


def format_duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``02:03``, with days in front where there are any."""
    days, rest = divmod(round(seconds), SECONDS_IN_A_DAY)
    hours, rest = divmod(rest, 3600)
    minutes, whole = divmod(rest, 60)
    short = f"{hours}:{minutes:02}:{whole:02}" if hours or days else f"{minutes:02}:{whole:02}"
    return f"{days} d {short}" if days else short


def format_progress(done: int, total: int | None, seconds: float) -> str:
    """One line of progress.

    Args:
        done: images finished since the clock started.
        total: images to do in all, counted from the same moment; None if unknown.
        seconds: on the clock.
    """
    rate = done / seconds if seconds > 0 else 0.0
    speed = f"{rate:.2f} images/s" if rate >= 1 or rate == 0 else f"{1 / rate:.2f} s/image"
    if total is None:
        return f"{done} images, {speed}"
    left = format_duration((total - done) / rate) if rate > 0 else "--:--"
    return f"{done}/{total} images, {speed}, {left} left"


class ImageProgress(ProgressBar):
    """Print images per second and the time left, on rank 0, for its own share of the images.

    On a terminal the line is rewritten in place; in a log file a new line appears now and then.

    Args:
        terminal_every: seconds between updates on a terminal.
        log_every: seconds between lines in a file or a pipe.
    """

    def __init__(self, terminal_every: float = 0.5, log_every: float = 30.0) -> None:
        super().__init__()
        self.terminal_every = terminal_every
        self.log_every = log_every
        self._enabled = True
        self._done = 0
        self._total: int | None = None
        self._started = 0.0
        self._printed = 0.0

    def disable(self) -> None:
        """Print nothing; Lightning calls it on every rank but 0."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; the model is loaded by now."""
        self._start(trainer.predict_dataloaders)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; the model is loaded by now."""
        self._start(trainer.test_dataloaders)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the batch's images."""
        self._advance(len(batch))

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the batch's images."""
        self._advance(len(batch))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the final line."""
        self._print(final=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the final line."""
        self._print(final=True)

    def _start(self, loader: Any) -> None:
        sampler = getattr(loader, "sampler", None)
        self._total = len(sampler) if sampler is not None else None
        self._done = 0
        self._started = self._printed = time.monotonic()

    def _advance(self, images: int) -> None:
        self._done += images
        every = self.terminal_every if sys.stderr.isatty() else self.log_every
        if time.monotonic() - self._printed >= every:
            self._print()

    def _print(self, final: bool = False) -> None:
        self._printed = time.monotonic()
        if not self._enabled:
            return
        line = format_progress(self._done, self._total, self._printed - self._started)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if final else ""))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()
