"""The optimizer and the learning rate of each step, as the recipe's train section describes them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from data_prep.user_error import UserError
from trainer.recipe import TrainConfig


def check_optimizer(train: TrainConfig) -> None:
    """Raises UserError where the optimizer cannot run on this machine."""
    if train.optimizer != "adamw" and not torch.cuda.is_available():
        raise UserError(f"train.optimizer={train.optimizer}: needs a GPU, and this machine has none; use adamw")


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


def build_scheduler(train: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """transformers' schedule of the learning rate over `steps` optimizer steps."""
    from transformers import get_scheduler

    warmup = train.warmup_steps
    if warmup is None:
        warmup = round((train.warmup_ratio or 0.0) * steps)
    name = "constant_with_warmup" if train.lr_scheduler == "constant" else train.lr_scheduler
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
