"""Time spent, in pairs: contestants take turns, so that what else the machine does meets all."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import TracebackType

import torch


@dataclass(frozen=True)
class Spent:
    """Seconds of one run.

    Attributes:
        wall: by the clock.
        processor: of all threads of this process; what other programs do hardly changes it.
        counts: which of the two counts: the processor's for a single thread on the CPU, where it
            is the wall time of an idle machine; else the clock's.
    """

    wall: float
    processor: float
    counts: str = "wall"

    @property
    def seconds(self) -> float:
        """The time that counts."""
        return self.wall if self.counts == "wall" else self.processor


class Stopwatch:
    """Measures a ``with`` block; on a GPU until its queue is empty."""

    spent: Spent

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> "Stopwatch":
        """Start."""
        self.start()
        return self

    def start(self) -> None:
        """Start, where no ``with`` block can stand."""
        _synchronise(self.device)
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.spent = self.read()

    def read(self) -> Spent:
        """The time since the start."""
        _synchronise(self.device)
        wall = time.perf_counter() - self._wall
        processor = time.process_time() - self._processor
        single = self.device.type == "cpu" and torch.get_num_threads() == 1
        return Spent(wall, processor, "processor" if single else "wall")


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: bool = True,
) -> dict[str, list[Spent]]:
    """Time functions in turns.

    Args:
        functions: by name; each round begins with another one.
        rounds: how many times each is timed.
        device: where they run.
        warm_up: run each once before.
    """
    for function in functions.values() if warm_up else ():
        function()
    names = list(functions)
    spent: dict[str, list[Spent]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            with Stopwatch(device) as watch:
                functions[name]()
            spent[name].append(watch.spent)
    return spent


def ratio(over: Sequence[Spent], under: Sequence[Spent]) -> float:
    """The median of the paired ratios."""
    return median(a.seconds / b.seconds for a, b in zip(over, under, strict=True))


def middle(spent: Sequence[Spent]) -> float:
    """The median time that counts, in seconds."""
    return median(each.seconds for each in spent)


def describe_pairs(over: Sequence[Spent], under: Sequence[Spent]) -> str:
    """Both medians, the spread of the paired ratios, and their median by the clock."""
    pairs = list(zip(over, under, strict=True))
    ratios = sorted(a.seconds / b.seconds for a, b in pairs)
    wall = median(a.wall / b.wall for a, b in pairs)
    return (
        f"{1e3 * middle(over):.4g} ms over {1e3 * middle(under):.4g} ms, {len(pairs)} pairs from "
        f"{ratios[0]:.3g} to {ratios[-1]:.3g}; by the clock {wall:.3g}"
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
