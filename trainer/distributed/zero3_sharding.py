"""Hand a parameter's shards to ZeRO-3 without the parameter ever existing whole.

DeepSpeed partitions tensors that it is given; here it is given only what it would have kept. That takes calls
and attributes private to DeepSpeed (written against 0.19.8, which setup.cfg pins); they are all in this file.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param
from torch import Tensor, nn


class Zero3Sharding:
    """The shards of ZeRO-3 for a process group that stands already (trainer.base.sharding.Shards).

    `config` is DeepSpeed's configuration as `deepspeed.initialize` will get it, one that
    `trainer.distributed.deepspeed_config.check_config` let pass:
    parameter offload and pinning follow from it. Every rank makes the same calls of `keep` in the same order:
    DeepSpeed numbers parameters.
    """

    def __init__(self, config: dict[str, Any], device: torch.device | str):
        # Not entered as a context: nothing is patched, only its methods on single parameters serve.
        self._init = deepspeed.zero.Init(config_dict_or_path=config)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(device)

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        init = self._init
        length = -(-numel // self.world)
        run = torch.zeros(length, dtype=dtype, device=torch.device(init.remote_device))
        if init.pin_memory and run.device.type == "cpu":
            run = deepspeed.accelerator.get_accelerator().pin_memory(run)
        return run

    def gather(self, mine: Tensor) -> Tensor:
        everyone = mine.new_empty(self.world * mine.numel())
        dist.all_gather_into_tensor(everyone, mine)  # every rank; a rank that failed before leaves them waiting
        return everyone

    def keep(self, run: Tensor, shape: Sequence[int]) -> nn.Parameter:
        # Full shape with one element behind it: DeepSpeed reads the shape and then frees the data.
        whole = torch.empty(1, dtype=run.dtype, device=self._init.local_device).expand(*shape)
        parameter = nn.Parameter(whole, requires_grad=False)
        self._init._convert_to_deepspeed_param(parameter)
        run.ds_numel = run.numel()
        run.status = PartitionedParamStatus.AVAILABLE
        run.final_location = None
        parameter.ds_tensor = run
        parameter.ds_numel_aligned = self._init._aligned_size(parameter)
        assert parameter.ds_numel_aligned == run.numel() * self.world, (shape, run.numel(), self.world)
        free_param(parameter)
        return parameter
