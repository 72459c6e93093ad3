"""Batches dealt over ranks."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

Batch = TypeVar("Batch")
Found = TypeVar("Found")


def map_over_ranks(
    batches: Sequence[Batch], work: Callable[[Batch], Found], idle: Callable[[], object] | None
) -> list[Found]:
    """What `work` finds in each batch, in their order, on every rank. Every rank calls this with the same batches.

    Whole batches are dealt, so that what a batch is padded to, and with it the last bit of every result, does not
    depend on the number of ranks. idle: forwards of no use for a rank that has one batch less than others, where they
    share the model's parameters (ZeRO-3) and would wait for it; None where each has its own. Ends in a collective;
    without a process group this process is the only rank.
    """
    if not dist.is_initialized():
        return [work(batch) for batch in batches]
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = [work(batch) for batch in batches[rank::world]]
    if idle is not None and rank >= len(batches) % world > 0:
        idle()
    everyone: list[list[Found]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, mine)
    return [everyone[index % world][index // world] for index in range(len(batches))]
