"""Where the base goes: sharded over groups of ranks by ZeRO-3, or whole on each rank."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.base.sharding import ShardingStrategy, Unsharded
from trainer.distributed.deepspeed_internals import ShardedParameterFactory


class Zero3Sharding:
    """ShardingStrategy of ZeRO-3 over groups of neighbouring ranks, each of which has one copy of the base.

    config: DeepSpeed's, as `deepspeed.initialize` will get it, accepted by `check_sharded_base`. size: ranks of a
    group, as `shard_group_size` returns it. Collective: every rank makes one, with the same size, and then the same
    calls of `keep` in the same order.
    """

    def __init__(self, config: dict[str, Any], device: torch.device | str, size: int) -> None:
        self._group = _neighbours(size)
        self._parameters = ShardedParameterFactory(config, self._group)
        self.rank, self.world = self._group.rank(), size
        self.device = torch.device(device)

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._parameters.allocate(-(-numel // self.world), dtype)

    def gather(self, mine: Tensor) -> Tensor:
        """Collective: every rank of the group must call it. One that failed before leaves the others waiting."""
        everyone = mine.new_empty(self.world * mine.numel())
        dist.all_gather_into_tensor(everyone, mine, group=self._group)
        return everyone

    def keep(self, run: Tensor, shape: Sequence[int]) -> nn.Parameter:
        return self._parameters.make(run, shape)


def sharding_for(config: dict[str, Any], device: torch.device, size: int) -> ShardingStrategy:
    """ZeRO-3's sharding over groups of `size` ranks where the configuration asks for it, else the base whole.

    Collective: every rank must call it.
    """
    return Zero3Sharding(config, device, size) if config["zero_optimization"].get("stage") == 3 else Unsharded(device)


def _neighbours(size: int) -> dist.ProcessGroup:
    """This rank's group among groups of `size` ranks; that of all ranks where they are one group. Collective."""
    world = dist.group.WORLD
    assert world is not None  # the process group is initialized
    return world if size == world.size() else dist.new_subgroups(size)[0]
