"""DeepSpeed's engine: made around a module, stepped, and read back."""

from typing import Any

import torch
from torch import nn

from trainer.distributed.deepspeed_internals import is_sharded, undo_first_step
from trainer.distributed.expert_shard import merge_shards
from trainer.objective.optimizer import build_optimizer, build_scheduler
from trainer.recipe import TrainConfig


class NonFiniteGradient(ArithmeticError):
    """A gradient is infinite or not a number; the weights have not been touched."""


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
    undo_first_step(engine.optimizer)
    return engine


def apply_gradients(engine: Any) -> float:
    """DeepSpeed's step after the last micro-batch: clips and updates. Returns the gradient's norm before clipping.

    Raises NonFiniteGradient, on every rank, where the norm is not finite; the weights are then as they were.
    """
    norm = None
    if not (engine.zero_optimization() or engine.bfloat16_enabled()):
        # Here DeepSpeed checks nothing and reports no norm; everywhere else it skips a step that is not finite.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = _finite(torch.nn.utils.get_total_norm(gradients))
    engine.step()
    return norm if norm is not None else _finite(engine.get_global_grad_norm())


def gather_trainable(module: nn.Module) -> dict[str, torch.Tensor]:
    """Whole trainable parameters by their names in adapters, on the CPU, on every rank.

    Collective under ZeRO-3: every rank must call it, or the others wait forever. PEFT's own save_pretrained would
    write shape (0,) there, since it sees only the emptied local tensors.
    """
    import deepspeed

    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sharded = any(map(is_sharded, trainable.values()))
    with deepspeed.zero.GatheredParameters(list(trainable.values()), enabled=sharded):
        values = {name: p.detach().clone() for name, p in trainable.items()}
    return {name: value.cpu() for name, value in merge_shards(module, values).items()}


def _finite(norm: Any) -> float:
    value = float(norm)  # once: it waits for the GPU
    if not 0 <= value < float("inf"):
        raise NonFiniteGradient
    return value
