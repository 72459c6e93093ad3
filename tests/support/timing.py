"""How long work takes: on any device, and in processes of its own."""

import resource
import statistics
import time
from collections.abc import Callable

import torch


def median_seconds(action: Callable[[], object], device: torch.device, repetitions: int = 15, times: int = 5) -> float:
    """Seconds that one call takes, in the median of repetitions.

    Each repetition makes `times` calls and then waits for the device once, so a GPU works while the host goes on.
    """
    synchronize, taken = torch.get_device_module(device).synchronize, []
    for _ in range(repetitions + 1):
        synchronize()
        started = time.perf_counter()
        for _ in range(times):
            action()
        synchronize()
        taken.append((time.perf_counter() - started) / times)
    return statistics.median(taken[1:])


def children_seconds() -> float:
    """Processor time of processes that have ended: other work on the machine does not lengthen it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
