"""The optimizer and the learning rate of each step, as the recipe's train section describes them."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from data_prep.user_error import UserError
from trainer.recipe import TrainConfig
from trainer.run.gpu import require_gpu


def check_optimizer(train: TrainConfig) -> None:
    """Raises UserError where the optimizer cannot run on this machine."""
    if train.optimizer != "adamw":
        require_gpu("train.optimizer", train.optimizer, "adamw")


def check_warm_up(train: TrainConfig, steps: int) -> None:
    """Raises UserError where warm-up takes all of the run's `steps` optimizer steps."""
    if warmup_steps(train, steps) >= steps:
        key = "warmup_ratio" if train.warmup_steps is None else "warmup_steps"
        raise UserError(
            f"train.{key}={getattr(train, key)}: the run has {steps} steps, so it would end before the learning "
            "rate is reached; lower it"
        )


def build_optimizer(train: TrainConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's AdamW, or bitsandbytes' 8-bit forms of it, whose kernels need a GPU."""
    settings: dict[str, Any] = {
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


def set_steps(optimizer: Any, step: int) -> None:
    """Sets the number of updates by which AdamW corrects its moments' bias, wherever it has state."""
    for state in optimizer.state.values():
        state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step


def warmup_steps(train: TrainConfig, steps: int) -> int:
    """Steps of warm-up in a run of `steps` optimizer steps."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return round((train.warmup_ratio or 0.0) * steps)


def build_scheduler(train: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The learning rate over `steps` optimizer steps: warm-up, then transformers' schedule of the same name."""
    share = partial(_rate_share, kind=train.lr_scheduler, warmup=warmup_steps(train, steps), steps=steps)
    return LambdaLR(optimizer, share)


def _rate_share(step: int, kind: str, warmup: int, steps: int) -> float:
    """The share of the peak rate at a step, counted from 0.

    Warm-up starts at 1/warmup, not at 0 as in transformers: a step with rate 0 computes gradients and drops them.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return max(0.0, (steps - step) / max(1, steps - warmup))
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup)))))
