"""The process groups among which what learns is divided, and over which its gradients are summed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed.deepspeed_internals import register_expert_groups, tag_expert_parameters
from trainer.recipe import ExpertsConfig

Ranks = Sequence[int]


@dataclass(frozen=True)
class Division:
    """Where the parts of a parameter are that so many ranks learn together.

    among: the ranks over which ZeRO-3 cuts one copy of it. copies: those that have this rank's part, each of another
    copy; None: there is one copy.
    """

    among: dist.ProcessGroup
    copies: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        """Ranks that learn the parameter."""
        return self.among.size() * (self.copies.size() if self.copies is not None else 1)


@dataclass(frozen=True)
class AdapterGroups:
    """parallel: the n ranks that divide a layer's experts among them; one without placement. hosts: the same ranks, for
    tensors on the CPU. experts, shared: of the parameters that owners of the same experts, or all ranks, have."""

    parallel: dist.ProcessGroup
    hosts: dist.ProcessGroup
    experts: Division
    shared: Division

    @property
    def size(self) -> int:
        """n"""
        return self.parallel.size()


def make_adapter_groups(experts: ExpertsConfig, shard_group: int) -> AdapterGroups:
    """Makes the groups that a recipe needs. Collective: every rank must call it.

    shard_group: ranks among which one copy of the adapter is divided, as `shard_groups` returns it.
    """
    everyone = dist.group.WORLD
    assert everyone is not None  # the process group is initialized
    size, world = experts.parallel_size, everyone.size()
    made: dict[tuple[Ranks, ...], dist.ProcessGroup] = {}

    def group_of(lists: list[Ranks]) -> dist.ProcessGroup:
        """This rank's group. On GPUs each is one of NCCL's communicators, with buffers: none is made twice."""
        if len(lists) == 1:
            return everyone
        if tuple(lists) not in made:
            made[tuple(lists)] = dist.new_subgroups_by_enumeration([list(ranks) for ranks in lists])[0]
        return made[tuple(lists)]

    def division(among: list[Ranks], copies: list[Ranks]) -> Division:
        return Division(group_of(among), group_of(copies) if len(copies[0]) > 1 else None)

    alone: list[Ranks] = [(rank,) for rank in range(world)]
    neighbours: list[Ranks] = [range(start, start + size) for start in range(0, world, size)]
    blocks: list[Ranks] = [range(start, start + shard_group) for start in range(0, world, shard_group)]
    places: list[Ranks] = [range(first, world, shard_group) for first in range(shard_group)]
    shared = division(blocks, places)
    if experts.replicate:
        own = division(alone, [range(first, world, size) for first in range(size)])
    else:
        own = division([block[first::size] for block in blocks for first in range(size)], places)
    parallel = group_of(neighbours)
    # NCCL would take counts of tokens from the GPU, and the host would wait for what the GPU still has to do.
    apart = size > 1 and dist.get_backend(parallel) == "nccl" and experts.dispatch != "weights"
    hosts = dist.new_subgroups(size, backend="gloo")[0] if apart else parallel
    return AdapterGroups(parallel, hosts, own, shared)


def tag_for_zero3(groups: AdapterGroups, by_expert: Sequence[nn.Parameter], shared: Sequence[nn.Parameter]) -> None:
    """Has ZeRO-3 divide parameters so. Collective: every rank must call it, before `deepspeed.initialize`.

    by_expert: those that differ between the ranks of `parallel`. DeepSpeed divides gradients by all ranks, and sums
    them over those among which it cuts the parameter; the rest is trainer.distributed.accumulation's.
    """
    if groups.size > 1:
        register_expert_groups(groups.size, groups.parallel, groups.experts.among)
        tag_expert_parameters(by_expert, groups.size)
    if groups.shared.copies is not None:  # to DeepSpeed the experts of a group of one rank
        register_expert_groups(1, dist.new_subgroups(1)[0], groups.shared.among)
        tag_expert_parameters(shared, 1)


def sum_at_owner(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums all ranks' rows for this rank: parts [n, length], row j for rank j -> [length].

    Moves what a reduce-scatter moves, (n - 1) / n of the elements. Adds in the order of ranks, in fp32 or better, so
    that a rerun gives the same bits.
    """
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.sum(0, dtype=torch.promote_types(parts.dtype, torch.float32)).to(parts.dtype)
