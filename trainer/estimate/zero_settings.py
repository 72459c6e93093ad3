"""The settings of a DeepSpeed configuration that decide where memory is allocated."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ZeroSettings:
    """ZeRO stage and offload. Bucket sizes, max_live, persistence and sub_group are in elements."""

    stage: int
    offload_param: bool
    offload_optimizer: bool
    reduce_bucket: int
    prefetch_bucket: int
    max_live: int
    persistence: int
    sub_group: int
    overlap: bool


def zero_settings(config: dict[str, Any]) -> ZeroSettings:
    """Reads a DeepSpeed configuration; missing keys get the defaults of DeepSpeed 0.19.8."""
    zero = config["zero_optimization"]
    return ZeroSettings(
        stage=zero.get("stage", 0),
        offload_param=_offloaded(zero, "offload_param"),
        offload_optimizer=_offloaded(zero, "offload_optimizer"),
        reduce_bucket=_elements(zero, "reduce_bucket_size", 5e8) if zero.get("contiguous_gradients", True) else 0,
        prefetch_bucket=_elements(zero, "stage3_prefetch_bucket_size", 5e7),
        max_live=_elements(zero, "stage3_max_live_parameters", 1e9),
        persistence=_elements(zero, "stage3_param_persistence_threshold", 1e5),
        sub_group=_elements(zero, "sub_group_size", 1e9),
        overlap=zero.get("overlap_comm") or False,
    )


def _offloaded(zero: dict[str, Any], section: str) -> bool:
    return (zero.get(section) or {}).get("device", "none") != "none"


def _elements(zero: dict[str, Any], key: str, default: float) -> int:
    value = zero.get(key, "auto")
    return int(default if value == "auto" else value)
