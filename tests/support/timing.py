"""Wall time of work on any device."""

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
