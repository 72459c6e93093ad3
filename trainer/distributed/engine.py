"""DeepSpeed's engine: its configuration, the optimizer, and what is read back from it."""

import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.user_error import UserError
from trainer.deepspeed_file import find_deepspeed_config
from trainer.distributed.expert_shard import merge_own
from trainer.objective.batches import BatchPlan
from trainer.recipe import Recipe, TrainConfig


def read_deepspeed_config(recipe: Recipe, plan: BatchPlan) -> dict[str, Any]:
    """The DeepSpeed JSON with every "auto" filled from the recipe: the only place where that happens.

    Raises UserError where the file cannot be read or contradicts the recipe.
    """
    path = recipe.deepspeed.config
    config = _read_json(find_deepspeed_config(path))
    fills: dict[tuple[str, ...], tuple[Any, str]] = {
        ("train_batch_size",): (plan.global_batch_size, "train.global_batch_size"),
        ("train_micro_batch_size_per_gpu",): (plan.micro_batch_size, "train.micro_batch_size"),
        ("gradient_accumulation_steps",): (plan.gradient_accumulation_steps, "the derived accumulation"),
        ("gradient_clipping",): (recipe.train.max_grad_norm, "train.max_grad_norm"),
        ("bf16", "enabled"): (recipe.base.dtype == "bf16", f"base.dtype={recipe.base.dtype}:"),
    }
    for keys, (value, origin) in fills.items():
        _fill(config, keys, value, origin, path)
    _refuse_what_the_recipe_owns(config, path)
    if not torch.cuda.is_available():  # there is nothing to pin for
        for section in ("offload_param", "offload_optimizer"):
            if section in config["zero_optimization"]:
                config["zero_optimization"][section]["pin_memory"] = False
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"deepspeed.config={path}: {error.strerror}; give a file such as ds_configs/zero3.json"
        ) from None
    except ValueError as error:
        raise UserError(f"deepspeed.config={path}: not JSON ({error}); compare with ds_configs/zero3.json") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise UserError(
            f"deepspeed.config={path}: expected a JSON object with a section zero_optimization; "
            "compare with ds_configs/zero3.json"
        )
    return config


def _fill(config: dict[str, Any], keys: tuple[str, ...], value: Any, origin: str, path: Path) -> None:
    *parents, last = keys
    for parent in parents:
        config = config.setdefault(parent, {})
    given = config.get(last, "auto")
    if given not in ("auto", value):
        raise UserError(
            f'{path}: {".".join(keys)}={given} contradicts {origin}={value} of the recipe; write "auto" in the file'
        )
    config[last] = value


def _refuse_what_the_recipe_owns(config: dict[str, Any], path: Path) -> None:
    for section, owner in (("optimizer", "train.optimizer"), ("scheduler", "train.lr_scheduler")):
        if section in config:
            raise UserError(f"{path}: section {section} is set by the recipe ({owner}); remove it from the file")
    if config.get("fp16", {}).get("enabled"):
        raise UserError(f"{path}: fp16.enabled=true: expected base.dtype bf16 or fp32; remove fp16 from the file")


def use_deterministic_kernels() -> None:
    """Refuses operations whose reruns may differ in their last bits. Before anything runs on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch's notes on reproducibility ask
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # which torch knows nothing of
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def build_optimizer(train: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW of torch, or bitsandbytes' 8-bit forms, whose kernels need a GPU."""
    settings = {
        "lr": train.learning_rate,
        "betas": train.betas,
        "eps": train.epsilon,
        "weight_decay": train.weight_decay,
    }
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes.optim as bnb

    kinds = {"adamw_8bit": bnb.AdamW8bit, "paged_adamw_8bit": bnb.PagedAdamW8bit}
    return kinds[train.optimizer](parameters, **settings)


def check_optimizer(train: TrainConfig) -> None:
    """Raises UserError where the optimizer cannot run on this machine."""
    if train.optimizer != "adamw" and not torch.cuda.is_available():
        raise UserError(f"train.optimizer={train.optimizer}: needs a GPU, and none is seen here; use adamw")


class NonFiniteGradient(ArithmeticError):
    """A gradient is infinite or not a number; the weights have not been touched."""


def build_scheduler(train: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The learning rate of each step: transformers' schedules."""
    from transformers import get_scheduler

    warmup = train.warmup_steps
    if warmup is None:
        warmup = round((train.warmup_ratio or 0.0) * steps)
    name = "constant_with_warmup" if train.lr_scheduler == "constant" else train.lr_scheduler
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def initialize(module: nn.Module, train: TrainConfig, config: dict[str, Any], steps: int) -> Any:
    """Hands the module to DeepSpeed, which shards parameters, gradients and optimizer state as `config` says."""
    import deepspeed

    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(train, trainable)
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=trainable,
        optimizer=optimizer,
        lr_scheduler=build_scheduler(train, optimizer, steps),
        config=config,
    )
    _undo_first_step(engine.optimizer)
    return engine


def fp32_copies(wrapper: Any) -> dict[nn.Parameter, torch.Tensor]:
    """What is stepped in each parameter's place where DeepSpeed trains in bf16 without ZeRO; else nothing.

    wrapper: the engine's optimizer.
    """
    computed, stepped = getattr(wrapper, "fp16_groups", ()), getattr(wrapper, "fp32_groups", ())
    return dict(zip(chain.from_iterable(computed), chain.from_iterable(stepped), strict=True)) if stepped else {}


@torch.no_grad()
def _undo_first_step(wrapper: Any) -> None:
    """There DeepSpeed makes a step with zero gradients, to have the optimizer's state: it counts and decays weights."""
    for parameter, stepped in fp32_copies(wrapper).items():
        stepped.copy_(parameter)
        wrapper.state.pop(stepped, None)


def apply_gradients(engine: Any) -> float | None:
    """DeepSpeed's step after one micro-batch: it counts, and after the last one of a step clips and updates.

    Gives the gradient's norm before clipping after the last, else None. Raises NonFiniteGradient, on every rank,
    where that is not finite; the weights are then as they were.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    norm = None
    if not (engine.zero_optimization() or engine.bfloat16_enabled()):
        # Here DeepSpeed checks nothing and tells no norm; everywhere else it skips a step that is not finite.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = _checked(torch.nn.utils.get_total_norm(gradients))
    engine.step()
    return norm if norm is not None else _checked(engine.get_global_grad_norm())


def _checked(norm: Any) -> float:
    if not 0 <= float(norm) < float("inf"):
        raise NonFiniteGradient
    return float(norm)


def gather_trainable(module: nn.Module) -> dict[str, torch.Tensor]:
    """Whole trainable parameters by their names without placement, on the CPU, on every rank.

    A collective over all ranks under ZeRO-3: every rank must call it, or the others wait for ever. PEFT's own
    save_pretrained would write shape (0,) there, since it sees only the emptied local tensors.
    """
    import deepspeed

    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sharded = any(hasattr(p, "ds_id") for p in trainable.values())
    with deepspeed.zero.GatheredParameters(list(trainable.values()), enabled=sharded):
        values = {name: p.detach().clone() for name, p in trainable.items()}
    return {name: value.cpu() for name, value in merge_own(module, values).items()}
