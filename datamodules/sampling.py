"""Which items of a data set a process of a distributed run looks at."""

from collections.abc import Iterator, Sequence

from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler


class ProcessSampler(DistributedSampler[int]):
    """Every n-th item, from the process's own rank on: each item once, in order.

    Torch's own sampler repeats items until all processes have as many, and Lightning's refuses
    fewer items than processes; here such a process has nothing to do. Lightning leaves any
    `DistributedSampler` of a loader in place.

    Args:
        items: what is sampled from; only their number counts.
        processes: how many there are.
        rank: of this process, from 0.
    """

    def __init__(self, items: Sequence[object], processes: int, rank: int) -> None:
        # Torch asks for a Dataset, of which it uses the length alone.
        super().__init__(items, processes, rank, shuffle=False)  # type: ignore[arg-type]
        self._indices = range(rank, len(items), processes)

    def __iter__(self) -> Iterator[int]:
        """The indices of this process's items, in order."""
        return iter(self._indices)

    def __len__(self) -> int:
        """The number of this process's items."""
        return len(self._indices)


def own_part(trainer: Trainer | None, items: Sequence[object]) -> ProcessSampler | None:
    """The sampler of this process's part of the items; None where there is but one process.

    Args:
        trainer: the DataModule's, which knows the processes; None outside a run.
        items: those of the run's shard that are left to do.
    """
    if trainer is None or trainer.world_size == 1:
        return None
    return ProcessSampler(items, trainer.world_size, trainer.global_rank)
