"""`map` over batches, divided among the ranks."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def map_over_ranks(
    batches: Sequence[Batch], work: Callable[[Batch], Result], idle: Callable[[], object] | None
) -> list[Result]:
    """The result of `work` for each batch, in order, on every rank. Collective: all ranks pass the same batches.

    Whole batches are distributed, so the padding of a batch, and with it the last bit of every result, does not depend
    on the number of ranks. idle: a dummy forward, called by ranks that have one batch less than others. Needed where
    ranks share the model's parameters (ZeRO-3), since the others would wait for it; None where each rank has its own.
    Without a process group, this process is the only rank.
    """
    if not dist.is_initialized():
        return [work(batch) for batch in batches]
    rank, world = dist.get_rank(), dist.get_world_size()
    own = [work(batch) for batch in batches[rank::world]]
    if idle is not None and rank >= len(batches) % world > 0:
        idle()
    by_rank: list[list[Result]] = [[] for _ in range(world)]
    dist.all_gather_object(by_rank, own)
    return [by_rank[index % world][index // world] for index in range(len(batches))]
