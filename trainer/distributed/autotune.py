"""Measures from which number of tokens on it pays to move weights instead of tokens, on the machines at hand.

Bytes decide where links are slow; where a collective's latency outweighs what it carries, only a clock can tell.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.expert_parallel import ExpertParallel
from trainer.distributed.expert_shard import Gather
from trainer.distributed.token_dispatcher import TokenDispatcher

FEW, MANY = 1, 512  # tokens a rank
WARM_UP, REPETITIONS = 3, 9


@torch.no_grad()
def autotune(placement: ExpertParallel) -> None:
    """Sets what dispatch `auto` switches by, alike on every rank; every rank calls it, after ZeRO-3 has the model.

    Compared are, for one decoder layer, gathering all experts and exchanging the tokens of each adapter, the latter
    linear in the tokens. A training step moves weights three times (backward gathers again, and sums gradients) and
    tokens twice.
    """
    layer = placement.layers[-1]
    device = layer.experts[0].own.device

    def gather(travel: bool) -> float:
        wanted = [held.by_expert and travel for held in layer.held]
        return _seconds(lambda: Gather(layer.held, wanted, device).wait(), device)

    def exchange(tokens: int) -> float:
        every = TokenDispatcher(placement.groups.parallel, (tokens,) * placement.groups.size)
        own = Gather(layer.held, [False] * len(layer.held), device).wait()
        experts = [value for value, held in zip(own, layer.held, strict=True) if held in layer.experts]
        return sum(_beyond_local(every, matrix, tokens, device) for matrix in experts)

    found = torch.tensor([gather(True) - gather(False), exchange(FEW), exchange(MANY)], device=device)
    dist.all_reduce(found)
    weights, few, many = (found / dist.get_world_size()).tolist()
    a_token = max(many - few, 1e-9) / (MANY - FEW)
    placement.tokens_up_to = {
        training: max(0, int(FEW + (ratio * weights - few) / a_token)) if ratio * weights > few else 0
        for training, ratio in ((False, 1.0), (True, 1.5))
    }


def _beyond_local(exchange: TokenDispatcher, own: Tensor, tokens: int, device: torch.device) -> float:
    """Seconds that an exchange takes more than the same product with all experts here."""
    n, rows = len(exchange.counts), own.shape[0] * own.shape[1]
    y = own.new_zeros(tokens, own.shape[2])
    gated, whole = own.new_zeros(n * rows, tokens), own.flatten(0, 1).repeat(n, 1)
    away = _seconds(lambda: exchange.add(y, gated, own), device)
    return away - _seconds(lambda: torch.addmm(y, gated.t(), whole), device)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Median wall time."""
    taken = []
    for _ in range(WARM_UP + REPETITIONS):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[WARM_UP:])
