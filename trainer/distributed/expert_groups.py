"""The process groups of expert placement, and the tags by which DeepSpeed's ZeRO-3 knows placed parameters.

Private to DeepSpeed (written against 0.19.8, which setup.cfg pins): its tables of expert groups, and the attributes
of a parameter that it reads. Some of them alone would be silently wrong; the parity tests see to it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups as tables
from torch import nn

from data_prep.user_error import UserError
from trainer.distributed.expert_shard import ExpertGroups
from trainer.recipe import ExpertsConfig


def check_expert_parallel(
    experts: ExpertsConfig, local_ranks: Sequence[int], deepspeed_config: dict[str, Any], path: Path
) -> None:
    """Raises UserError where these ranks cannot hold the placement.

    local_ranks: LOCAL_RANK of every rank, in order; a node begins at each 0. path: of the DeepSpeed configuration.
    """
    size, world = experts.parallel_size, len(local_ranks)
    stage = deepspeed_config["zero_optimization"].get("stage")
    if size > 1 and stage != 3:
        raise UserError(
            f"experts.parallel_size={size}: {path} has ZeRO stage {stage}, which keeps every parameter whole on every "
            "rank and knows no expert groups; use ds_configs/zero3.json or set it to 1"
        )
    if world % size:
        raise UserError(f"experts.parallel_size={size} does not divide the {world} ranks of this run; change one")
    blocks = [list(local_ranks[start : start + size]) for start in range(0, world, size)]
    if not experts.across_nodes and any(block != list(range(block[0], block[0] + size)) for block in blocks):
        raise UserError(
            f"experts.parallel_size={size}: a group would stand on two nodes; choose a divisor of the ranks of a node "
            "or set experts.across_nodes=true"
        )


def make_groups(experts: ExpertsConfig) -> ExpertGroups:
    """The groups of a placement, each of consecutive ranks; every rank takes part.

    Enters them in DeepSpeed's tables, where ZeRO-3 looks up over which ranks a tagged parameter is partitioned, and
    over which the norm of its gradient is summed.
    """
    size, world = experts.parallel_size, dist.get_world_size()
    parallel, _ = dist.new_subgroups(size)
    replicas, _ = dist.new_subgroups_by_enumeration([list(range(first, world, size)) for first in range(size)])
    alone, _ = dist.new_subgroups(1)
    tables._EXPERT_PARALLEL_GROUP[_table_key(size)] = parallel
    tables._EXPERT_DATA_PARALLEL_GROUP[_table_key(size)] = alone if experts.replicate else replicas
    return ExpertGroups(parallel, replicas, experts.replicate)


def tag_experts(parameters: Iterable[nn.Parameter], size: int) -> None:
    """Tells ZeRO-3 over which group each placed parameter is partitioned, before it sees them."""
    key = _table_key(size)
    group = tables._get_expert_data_parallel_group(key)
    for parameter in parameters:
        parameter.allreduce = False
        parameter.group_name = key
        parameter.ds_zero_placement_family = "autoep_expert"
        parameter.ds_zero_partition_group_name = key
        parameter.ds_zero_partition_process_group = group
        parameter.ds_zero_partition_rank = group.rank()
        parameter.ds_zero_partition_world_size = group.size()


def _table_key(size: int) -> str:
    return f"ep_size_{size}"  # DeepSpeed reads the size out of the name
