"""The settings of a DeepSpeed configuration that decide where memory is allocated."""

from dataclasses import dataclass
from typing import Any

from trainer.distributed.deepspeed_sections import Zero


@dataclass(frozen=True)
class ZeroSettings:
    """ZeRO stage, offload and groups. Bucket sizes, max_live, persistence and sub_group are in elements.

    shard_group: ranks that divide one copy of the base among them.
    """

    stage: int
    shard_group: int
    offload_param: bool
    offload_optimizer: bool
    reduce_bucket: int
    prefetch_bucket: int
    max_live: int
    persistence: int
    sub_group: int
    overlap: bool


def zero_settings(config: dict[str, Any], shard_group: int) -> ZeroSettings:
    """Reads a DeepSpeed configuration; what it leaves out gets DeepSpeed's defaults."""
    zero = Zero.model_validate(config["zero_optimization"])
    return ZeroSettings(
        stage=zero.stage,
        shard_group=shard_group,
        offload_param=zero.offload_param.device != "none",
        offload_optimizer=zero.offload_optimizer.device != "none",
        reduce_bucket=zero.reduce_bucket_size if zero.contiguous_gradients else 0,
        prefetch_bucket=zero.stage3_prefetch_bucket_size,
        max_live=zero.stage3_max_live_parameters,
        persistence=zero.stage3_param_persistence_threshold,
        sub_group=zero.sub_group_size,
        overlap=zero.overlap_comm or False,
    )
