"""Measures the number of tokens above which it pays to move weights instead of tokens, on the machines at hand.

Bytes decide where links are slow; where a collective's latency outweighs what it carries, only a clock can tell.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.expert_parallel import ExpertParallel
from trainer.distributed.expert_shard import LayerGather
from trainer.distributed.token_dispatcher import TokenDispatcher

FEW, MANY = 1, 512  # tokens per rank
WARM_UP, REPETITIONS = 3, 9


@torch.no_grad()
def autotune(expert_parallel: ExpertParallel) -> None:
    """Sets the thresholds of dispatch `auto`, the same on every rank.

    Collective: every rank must call it, after ZeRO-3 has taken the model over. For one decoder layer it compares
    gathering all experts with exchanging the tokens of each adapter, the latter linear in the tokens. A training step
    moves weights three times (backward gathers again, and sums gradients) and tokens twice.
    """
    layer = expert_parallel.layers[-1]
    device = layer.experts[0].learned.device

    def gather(travel: bool) -> float:
        wanted = [shard.by_expert and travel for shard in layer.shards]
        return _seconds(lambda: LayerGather(layer.shards, wanted, device).wait(), device)

    def exchange(tokens: int) -> float:
        dispatcher = TokenDispatcher(expert_parallel.groups.parallel, (tokens,) * expert_parallel.groups.size)
        own = LayerGather(layer.shards, [False] * len(layer.shards), device).wait()
        experts = [value for value, shard in zip(own, layer.shards, strict=True) if shard in layer.experts]
        return sum(_beyond_local(dispatcher, matrix, tokens, device) for matrix in experts)

    found = torch.tensor([gather(True) - gather(False), exchange(FEW), exchange(MANY)], device=device)
    dist.all_reduce(found)
    weights, few, many = (found / dist.get_world_size()).tolist()
    per_token = max(many - few, 1e-9) / (MANY - FEW)
    expert_parallel.tokens_up_to = {
        training: max(0, int(FEW + (ratio * weights - few) / per_token)) if ratio * weights > few else 0
        for training, ratio in ((False, 1.0), (True, 1.5))
    }


def _beyond_local(dispatcher: TokenDispatcher, own: Tensor, tokens: int, device: torch.device) -> float:
    """Seconds that an exchange takes beyond the same product with all experts on this rank."""
    n, rows = len(dispatcher.counts), own.shape[0] * own.shape[1]
    y = own.new_zeros(tokens, own.shape[2])
    gated, whole = own.new_zeros(n * rows, tokens), own.flatten(0, 1).repeat(n, 1)
    away = _seconds(lambda: dispatcher.add(y, gated, own), device)
    return away - _seconds(lambda: torch.addmm(y, gated.t(), whole), device)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Median wall time."""
    taken = []
    for _ in range(WARM_UP + REPETITIONS):
        started = time.perf_counter()
        action()
        torch.get_device_module(device).synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[WARM_UP:])
