"""Seconds and memory of a way, from nothing: latents and features are part of it."""

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from g4seg_pl.core.background import BackgroundRule
from g4seg_pl.lab.chain import ChainRunner, make_batch
from g4seg_pl.lab.stages import Masks, Way
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import Sample


class PeakMemory:
    """The most memory in use within a ``with`` block beyond what was in use before, in bytes.

    On a GPU torch's own count. On the CPU the process's resident memory, looked at every two
    milliseconds: a lower bound. Not a number where neither can be read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = float("nan")
        self._stop = threading.Event()

    def __enter__(self) -> "PeakMemory":
        """Begin to watch."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = float(torch.cuda.memory_allocated(self.device))
            return self
        _give_back_freed_memory()
        self._before = self._peak = _resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and say what was found."""
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._peak, _resident()) - self._before

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, _resident())


@dataclass(frozen=True)
class Cost:
    """What a way costs.

    Attributes:
        seconds: a mask, encoding included.
        megabytes: most memory beyond the models', of one batch.
        masks: over which this was taken.
    """

    seconds: float
    megabytes: float
    masks: int


def cost_of(
    way: Way, refiner: G4SegRefiner, samples: Sequence[Sample], background: BackgroundRule
) -> Cost:
    """Run a way on a batch from nothing, after one run on its first image to warm up."""
    _run(way, refiner, samples[:1], background)
    with PeakMemory(refiner.generator.alphas_cumprod.device) as memory:
        started = time.perf_counter()
        _run(way, refiner, samples, background)
        seconds = time.perf_counter() - started
    masks = sum(len(sample.class_names) for sample in samples)
    return Cost(seconds / masks, memory.bytes / 1e6, masks)


def _run(
    way: Way, refiner: G4SegRefiner, samples: Sequence[Sample], background: BackgroundRule
) -> None:
    seeds = Masks(tuple(sample.seed.scores.float() for sample in samples), background)
    with torch.no_grad():
        ChainRunner(make_batch(refiner, samples, warm=False), seeds).run(way)
    device = refiner.generator.alphas_cumprod.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return float("nan")
    return float(pages * 4096)


def _give_back_freed_memory() -> None:
    # Otherwise memory that an earlier way freed hides what the next one takes.
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
