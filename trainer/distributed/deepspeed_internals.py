"""All that this project uses of DeepSpeed's private parts, written against 0.19.8, which setup.cfg pins.

No other module touches a `ds_*` attribute of a parameter or a private name of DeepSpeed (tests/test_layout.py). When
DeepSpeed is upgraded, this is the file to check, and the parity and resume tests of tests/distributed are the proof:
most of what is wrong here is wrong in silence. DeepSpeed takes seconds to import, and the estimate needs only what asks
about parameters, so it is imported where it is used.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.objective.optimizer import set_steps


def disable_cpu_op_build() -> None:
    """Keeps DeepSpeed from compiling its shared-memory op at first use on a CPU (half a minute).

    The op serves tensor-parallel inference only.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def tolerate_unread_memory() -> None:
    """Lets steps go on where a CPU's process cannot read what memory it has, as without a free file descriptor.

    After each step of ZeRO-3 DeepSpeed asks for it (stage3.py), for a count that only GPUs have.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    read = type(accelerator).get_rss

    def get_rss() -> int:
        try:
            return read(accelerator)
        except OSError:
            return accelerator.max_mem

    accelerator.get_rss = get_rss


# Parameters under ZeRO-3: the parameter itself is empty, and `ds_tensor` is this rank's shard of it.


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has the parameter."""
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape before ZeRO-3 emptied it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_shard(parameter: nn.Parameter) -> Tensor:
    """What this rank stores of the parameter, flat and padded under ZeRO-3; else the parameter."""
    return getattr(parameter, "ds_tensor", parameter)


class ShardedParameterFactory:
    """Makes ZeRO-3 parameters from shards, so that the whole never exists.

    DeepSpeed partitions tensors that it is given; here it is given only what it would have kept. config: as
    `deepspeed.initialize` will get it, since offload and pinning follow from it. group: the ranks that have the shards
    of one copy. Every rank must make the same parameters in the same order: DeepSpeed numbers them.
    """

    def __init__(self, config: dict[str, Any], group: dist.ProcessGroup) -> None:
        import deepspeed

        self._group = group

        # Not entered as a context: nothing is patched, only its methods for single parameters are used.
        self._init = deepspeed.zero.Init(config_dict_or_path=config)

    def allocate(self, length: int, dtype: torch.dtype) -> Tensor:
        """Zeros [length] where a shard will stay: on the device, or on the host with parameter offload."""
        shard = torch.zeros(length, dtype=dtype, device=torch.device(self._init.remote_device))
        if self._init.pin_memory and shard.device.type == "cpu":
            from deepspeed.accelerator import get_accelerator

            shard = get_accelerator().pin_memory(shard)
        return shard

    def make(self, shard: Tensor, shape: Sequence[int]) -> nn.Parameter:
        """The frozen parameter of `shape` whose shard on this rank is `shard`, made by `allocate`."""
        from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param

        # The full shape with one element behind it: DeepSpeed reads the shape and then frees the data.
        whole = torch.empty(1, dtype=shard.dtype, device=self._init.local_device).expand(*shape)
        parameter: Any = nn.Parameter(whole, requires_grad=False)
        parameter.ds_zero_partition_process_group = self._group  # DeepSpeed cuts and gathers it over these ranks
        self._init._convert_to_deepspeed_param(parameter)
        stored: Any = shard
        stored.ds_numel = shard.numel()
        stored.status = PartitionedParamStatus.AVAILABLE
        stored.final_location = None
        parameter.ds_tensor = stored
        parameter.ds_numel_aligned = self._init._aligned_size(parameter)
        assert parameter.ds_numel_aligned == shard.numel() * self._group.size(), (shape, shard.numel())
        free_param(parameter)
        return parameter


# Experts that are partitioned over fewer ranks than the world.


def register_expert_groups(size: int, parallel: dist.ProcessGroup, partition: dist.ProcessGroup) -> None:
    """Enters the groups of expert parallelism over `size` ranks in DeepSpeed's tables.

    ZeRO-3 looks up there over which ranks (`partition`) a tagged parameter is cut, and over which (`parallel`) the
    norm of its gradient is summed.
    """
    from deepspeed.utils import groups

    groups._EXPERT_PARALLEL_GROUP[_group_name(size)] = parallel
    groups._EXPERT_DATA_PARALLEL_GROUP[_group_name(size)] = partition


def tag_expert_parameters(parameters: Iterable[nn.Parameter], size: int) -> None:
    """Marks parameters as experts of a registered group; call it before `deepspeed.initialize`.

    All seven attributes are needed: with the first two alone gradients are silently wrong.
    """
    from deepspeed.utils import groups

    name = _group_name(size)
    group = groups._get_expert_data_parallel_group(name)
    for parameter in parameters:
        tagged: Any = parameter
        tagged.allreduce = False
        tagged.group_name = name
        tagged.ds_zero_placement_family = "autoep_expert"
        tagged.ds_zero_partition_group_name = name
        tagged.ds_zero_partition_process_group = group
        tagged.ds_zero_partition_rank = group.rank()
        tagged.ds_zero_partition_world_size = group.size()


def _group_name(size: int) -> str:
    return f"ep_size_{size}"  # DeepSpeed reads the size from the name


# Activations on the host.


def offload_checkpoints(module: nn.Module) -> AbstractContextManager:
    """A context in which the inputs of the module's checkpointed decoder layers wait in pinned host memory.

    It must surround a forward with its backward; it can be entered again, not twice at a time. Call this after
    `deepspeed.initialize`. On a CPU nothing is moved.

    DeepSpeed marks what a layer is given, before ZeRO-3's hook puts another tensor in its place, which nothing then
    moves: so it is marked once more behind that hook. DeepSpeed also keeps on the device what it has brought back until
    the context ends, so that backward would end with all layers' inputs there.
    """
    from deepspeed.runtime.activation_checkpointing.offload_activations import CheckpointHiddenStatesOffload
    from transformers import GradientCheckpointingLayer

    class Offload(CheckpointHiddenStatesOffload):
        def _restore_tensor(self, tensor_id: int, cache: bool = True) -> Tensor:
            return super()._restore_tensor(tensor_id, cache=False)

    offload = Offload()
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.register_forward_pre_hook(lambda _layer, inputs: offload.mark(inputs[0]))
    return offload


# The flat fp32 tensors that the optimizer steps.


@dataclass(frozen=True)
class OptimizerSlice:
    """Where a parameter's elements from `start` on lie: in the tensor `flat` (fp32), `numel` of them from `offset`."""

    flat: Tensor
    offset: int
    start: int
    numel: int


def fp32_copies(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """The tensor that is stepped in each parameter's place where DeepSpeed trains in bf16 without ZeRO; else nothing.

    optimizer: the engine's.
    """
    computed, stepped = getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ())
    return dict(zip(chain.from_iterable(computed), chain.from_iterable(stepped), strict=True)) if stepped else {}


@torch.no_grad()
def undo_first_step(optimizer: Any) -> None:
    """Takes back the step that DeepSpeed makes at initialisation in bf16 without ZeRO.

    It makes it with zero gradients, to allocate the optimizer's state; but the step counts, and decays weights. The
    state stays, with moments of zero: bitsandbytes never frees paged memory (functional.get_paged), so dropping it
    would hold every paged moment twice.
    """
    copies = fp32_copies(optimizer)
    for parameter, stepped in copies.items():
        stepped.copy_(parameter)
    if copies:
        set_steps(optimizer, 0)


def find_optimizer_slice(
    parameter: nn.Parameter, optimizer: torch.optim.Optimizer, copies: dict[nn.Parameter, Tensor]
) -> OptimizerSlice | None:
    """Which elements of the parameter this rank's optimizer steps, and where; None where it steps none of them.

    optimizer: the basic one. copies: as `fp32_copies` returns them.
    """
    if is_sharded(parameter):  # ZeRO-3
        zero = _zero3_optimizer(parameter)
        group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        return OptimizerSlice(flat, offset, _partition_rank(parameter) * numel, numel)
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return OptimizerSlice(flat, here.start, there.start, here.numel)
    return OptimizerSlice(copies.get(parameter, parameter), 0, 0, parameter.numel())


def write_computed_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Sets what forward computes with, in the parameter's dtype, from the whole parameter's fp32 values (flat)."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if not is_sharded(parameter):
        parameter.data.copy_(values.view(parameter.shape))
        return
    sharded: Any = parameter
    shard = sharded.ds_tensor
    start = _partition_rank(parameter) * shard.ds_numel
    mine = values[start : start + shard.ds_numel]
    shard.data.view(-1)[: mine.numel()].copy_(mine)
    if sharded.ds_status == ZeroParamStatus.AVAILABLE:  # small parameters persist as wholes
        parameter.data.copy_(values.view(parameter.shape))


def _partition_rank(parameter: nn.Parameter) -> int:
    """This rank's place among those over which ZeRO-3 cuts the parameter."""
    return _zero3_optimizer(parameter)._get_param_partition_rank(parameter)


def _zero3_optimizer(parameter: nn.Parameter) -> Any:
    """The ZeRO-3 optimizer that has the parameter."""
    sharded: Any = parameter
    return sharded._z3_optimizer
