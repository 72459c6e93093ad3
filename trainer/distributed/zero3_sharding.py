"""Where the base goes: sharded over the ranks by ZeRO-3, or whole on each rank."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.base.sharding import ShardingStrategy, Unsharded
from trainer.distributed.deepspeed_internals import ShardedParameterFactory


class Zero3Sharding:
    """ShardingStrategy of ZeRO-3 over the ranks of the process group.

    config: DeepSpeed's, as `deepspeed.initialize` will get it, accepted by `check_sharded_base`. Every rank makes the
    same calls of `keep` in the same order.
    """

    def __init__(self, config: dict[str, Any], device: torch.device | str) -> None:
        self._parameters = ShardedParameterFactory(config)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(device)

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._parameters.allocate(-(-numel // self.world), dtype)

    def gather(self, mine: Tensor) -> Tensor:
        """Collective: every rank must call it. A rank that failed before leaves the others waiting."""
        everyone = mine.new_empty(self.world * mine.numel())
        dist.all_gather_into_tensor(everyone, mine)
        return everyone

    def keep(self, run: Tensor, shape: Sequence[int]) -> nn.Parameter:
        return self._parameters.make(run, shape)


def sharding_for(config: dict[str, Any], device: torch.device) -> ShardingStrategy:
    """ZeRO-3's sharding where the DeepSpeed configuration asks for it, else the base whole on each rank."""
    return Zero3Sharding(config, device) if config["zero_optimization"].get("stage") == 3 else Unsharded(device)
