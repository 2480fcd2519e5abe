"""The most memory that tensors take at once, to the byte."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_allocated(function: Callable[[], object], device: torch.device) -> float:
    """Return the most bytes allocated at once while a function runs, beyond those before.

    On the CPU every allocation of torch's allocator is followed by its profiler; resident memory,
    which the operating system counts, moves in steps too coarse for small differences.

    Args:
        function: what is run, once before and once while it is watched.
        device: where it runs.
    """
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        function()
    now = peak = 0.0
    for _, change in sorted(_changes(watched)):
        now += change
        peak = max(peak, now)
    return peak


def _changes(watched: profile) -> list[tuple[int, int]]:
    """Time and bytes of every allocation and, negative, every release.

    The profiler's own list of events has allocations summed up by operator; what is released
    within an operator would be missing from it.
    """
    raw: Any = watched.profiler
    events = raw.kineto_results.events()
    return [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
