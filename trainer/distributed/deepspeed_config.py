"""DeepSpeed's configuration: read from its JSON file, filled from the recipe, refused where it contradicts either.

Imports no DeepSpeed, so that the estimate and the checks before a launch are quick.
"""

import json
from pathlib import Path
from typing import Any

import torch

from data_prep.user_error import UserError
from trainer.distributed.deepspeed_file import read_deepspeed_file
from trainer.objective.batches import BatchPlan
from trainer.recipe import Recipe

# What the engine would do to a base that is loaded in shards, without a word, and the value that prevents it.
REFUSED = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "stage3_use_all_reduce_for_fetch_params": False,
}


def read_deepspeed_config(recipe: Recipe, plan: BatchPlan) -> dict[str, Any]:
    """The DeepSpeed JSON with what the recipe decides filled in: the only place where that happens.

    Raises UserError where the file cannot be read or contradicts the recipe.
    """
    path = recipe.deepspeed.config
    config = read_deepspeed_file(path)
    train, optimizer = recipe.train, f"train.optimizer={recipe.train.optimizer}"
    # By key: its value, and what of the recipe asks for it.
    fills: dict[tuple[str, ...], tuple[Any, str]] = {
        ("train_batch_size",): (plan.global_batch_size, f"train.global_batch_size={plan.global_batch_size}"),
        ("train_micro_batch_size_per_gpu",): (
            plan.micro_batch_size,
            f"train.micro_batch_size={plan.micro_batch_size}",
        ),
        ("gradient_accumulation_steps",): (
            plan.gradient_accumulation_steps,
            f"the accumulation of {plan.gradient_accumulation_steps} that follows from the batch sizes",
        ),
        ("gradient_clipping",): (train.max_grad_norm, f"train.max_grad_norm={train.max_grad_norm}"),
        ("bf16", "enabled"): (recipe.base.dtype == "bf16", f"base.dtype={recipe.base.dtype}"),
        # DeepSpeed would stop at an optimizer that is not its own.
        ("zero_allow_untested_optimizer",): (True, optimizer),
        ("zero_force_ds_cpu_optimizer",): (False, optimizer),
    }
    for keys, (value, origin) in fills.items():
        _fill(config, keys, value, origin, path)
    # DeepSpeed's timer waits for the GPU twice per micro-batch; the run measures its own throughput.
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    if not torch.cuda.is_available():  # without a GPU there is nothing to pin memory for
        for section in ("offload_param", "offload_optimizer"):
            if section in config["zero_optimization"]:
                config["zero_optimization"][section]["pin_memory"] = False
    return config


def check_sharded_base(config: dict[str, Any], path: Path) -> None:
    """Raises UserError, naming the file `path`, for settings that corrupt a base that ZeRO-3 gets in shards."""
    zero = config["zero_optimization"]
    if zero.get("stage") != 3:
        return
    for key, safe in REFUSED.items():
        if zero.get(key, safe) != safe:
            raise UserError(f"{path}: zero_optimization.{key}={zero[key]} corrupts a packed base; set it to {safe}")
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise UserError(f"{path}: zero_optimization.offload_param.device=nvme cannot take a packed base; use cpu")


def _fill(config: dict[str, Any], keys: tuple[str, ...], value: Any, origin: str, path: Path) -> None:
    *parents, last = keys
    for parent in parents:
        config = config.setdefault(parent, {})
    given = config.get(last, "auto")
    if given not in ("auto", value):
        raise UserError(
            f'{path}: {".".join(keys)}={json.dumps(given)} contradicts {origin} of the recipe; write "auto" in the file'
        )
    config[last] = value
