"""Names ranks that compute much slower than the others, which all the others wait for in each layer.

Step times do not show them: collectives make all ranks equally slow. Nor does CPU time: a throttled or suspended
process needs no more of it than others for the same work, and one that waits may or may not use any. What differs is
the wall time of the same piece of work without a collective in it. Such a piece is the forward of a frozen linear layer
under an adapter, once ZeRO-3 has gathered its weight. It is a good part of what a step computes. Its time is taken
inside DeepSpeed's hooks (3 microseconds per layer and forward), on a GPU by events in its stream, and is summed over
ranks together with the step's counts, so that nothing waits longer. A rank whose network or disk is slow is not found.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

WINDOW = 60.0  # seconds over which ranks are compared
SLOW, AS_FAST = 3.0, 2.0  # times the others' median: from here on slow, and until here slow no longer
MOST_LAYERS = 64  # that are timed


class ForwardTimer:
    """Times the forwards, in training mode, of frozen layers under adapters, evenly spread over the model.

    Make it after DeepSpeed's engine, whose hooks gather and release parameters outside of what is timed.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._now = _event if device.type == "cuda" else time.perf_counter
        self._begun: Any = None
        self._spans: list[tuple[Any, Any]] = []
        layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers[:: -(-len(layers) // MOST_LAYERS) or 1]:
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end, prepend=True)

    def take(self) -> float:
        """Seconds since the last call. On a GPU these forwards must be over, as they are after an optimizer step."""
        spans, self._spans = self._spans, []
        return sum(_seconds(begun, ended) for begun, ended in spans)

    def _begin(self, layer: nn.Module, _inputs: Any) -> None:
        self._begun = self._now() if layer.training else None

    def _end(self, _layer: nn.Module, _inputs: Any, _output: Any) -> None:
        if self._begun is not None:
            self._spans.append((self._begun, self._now()))


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begun: Any, ended: Any) -> float:
    return ended - begun if isinstance(begun, float) else begun.elapsed_time(ended) / 1000


class SlowRanks:
    """Compares ranks, once per window, and rank 0 prints what has changed.

    Make it on every rank, after DeepSpeed's engine. hosts: of each rank; with fewer than two, nothing is timed. window:
    seconds.
    """

    def __init__(self, model: nn.Module, device: torch.device, hosts: Sequence[str], window: float = WINDOW) -> None:
        self._hosts, self._window = hosts if len(hosts) > 1 else (), window
        self._timer = ForwardTimer(model, device) if self._hosts else None
        self._sums = [0] * len(self._hosts)
        self._since = time.perf_counter()
        self._slow: set[int] = set()

    def own_time(self) -> list[int]:
        """Nanoseconds of this rank since the last call, at its place among zeros for the others: sum it over ranks."""
        mine = [0] * len(self._hosts)
        if self._timer is not None:
            mine[dist.get_rank()] = int(self._timer.take() * 1e9)
        return mine

    def add(self, times: Sequence[int]) -> None:
        """times: of each rank, for as much work, in any unit."""
        self._sums = [before + more for before, more in zip(self._sums, times, strict=True)]
        seconds = time.perf_counter() - self._since
        if seconds >= self._window:
            if dist.get_rank() == 0:
                self._compare(seconds)
            self._sums, self._since = [0] * len(self._hosts), time.perf_counter()

    def _compare(self, seconds: float) -> None:
        for rank, own in enumerate(self._sums):
            others = statistics.median_low(self._sums[:rank] + self._sums[rank + 1 :])
            name = f"rank {rank} on {self._hosts[rank]}"
            if rank not in self._slow and own > SLOW * others > 0:
                self._slow.add(rank)
                print(
                    f"warning: {name} computes {own / others:.1f} times slower than the others (their median, over "
                    f"{seconds:.0f} s), and all wait for it; look there for other processes, limits of CPU time, heat",
                    file=sys.stderr,
                    flush=True,
                )
            elif rank in self._slow and own <= AS_FAST * others:
                self._slow.remove(rank)
                print(f"slow ranks      {name} is no longer slow", flush=True)
