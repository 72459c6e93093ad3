"""What a DeepSpeed configuration must not ask of a base that is handed over in shards; imports no DeepSpeed."""

from pathlib import Path
from typing import Any

from data_prep.user_error import UserError

# What the engine would do to shards behind our back, and the value that keeps it from it.
REFUSED = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "use_all_reduce_for_fetch_params": False,
}


def check_config(config: dict[str, Any], path: Path) -> None:
    """Raises UserError, naming the file `path`, for what a base in shards cannot bear (ZeRO-3)."""
    zero = config["zero_optimization"]
    if zero.get("stage") != 3:
        return
    for key, safe in REFUSED.items():
        if zero.get(key, safe) != safe:
            raise UserError(f"{path}: zero_optimization.{key}={zero[key]} corrupts a packed base; set it to {safe}")
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise UserError(f"{path}: zero_optimization.offload_param.device=nvme cannot take a packed base; use cpu")
    if config.get("data_types", {}).get("buffer_dtype"):
        raise UserError(f"{path}: data_types.buffer_dtype would cast rotary buffers; remove it")
