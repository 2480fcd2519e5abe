"""The order of training images, and the random draws of each, by seed and progress alone."""

from collections.abc import Callable, Iterator, Sized
from typing import NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler


class Draw(NamedTuple):
    """Which item to read, and the seed of what happens to it at random."""

    place: int
    seed: int


class EpochSampler(DistributedSampler[Draw]):
    """Shuffles anew each epoch; every item comes with a seed of its own.

    Neither depends on what ran before, on the number of workers, or on global generators: a run
    that is killed and resumed at an epoch's end sees what it would have seen. So progress is read
    off the trainer's steps: Lightning 2.6 makes the first iterator of a resumed run before it
    tells the sampler its epoch, and in runs bounded by steps alone its number is one too large.

    Args:
        items: anything with a length.
        seed: of the run.
        progress: gives a number that is another one each epoch, such as the steps taken; None
            takes the epoch of `set_epoch`.
        processes: among which the items are dealt out.
        rank: of this process.
    """

    def __init__(
        self,
        items: Sized,
        seed: int,
        progress: Callable[[], int] | None = None,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(items, processes, rank, seed=seed)  # type: ignore[arg-type]
        self._count = len(items)
        self._progress = progress

    def __iter__(self) -> Iterator[Draw]:
        """The next epoch's draws, for this process."""
        number = self.epoch if self._progress is None else self._progress()
        order = np.random.default_rng([self.seed, number]).permutation(self._count)
        # Processes must take equally many steps, so the first items fill up the last round.
        share = np.resize(order, self.total_size)[self.rank :: self.num_replicas]
        return iter([Draw(int(place), self._draw_seed(number, int(place))) for place in share])

    def _draw_seed(self, number: int, place: int) -> int:
        """Seed of what happens to an item in this epoch."""
        return int(np.random.SeedSequence([self.seed, number, place]).generate_state(1)[0])
