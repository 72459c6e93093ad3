"""Training as the train command sets it up: the one place where tests and benchmarks build a Trainer."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from data_prep.reader import PreparedSet
from trainer.base.weight_map import open_base
from trainer.checkpoint.async_saver import AsyncSaver
from trainer.checkpoint.trained_state import TrainedState
from trainer.distributed.deepspeed_config import read_deepspeed_config
from trainer.distributed.parallelize import parallelize
from trainer.distributed.rank_check import gather_local_ranks
from trainer.distributed.rank_groups import shard_groups
from trainer.distributed.zero3_sharding import sharding_for
from trainer.objective.batches import plan_batches
from trainer.objective.loss import TaskLosses
from trainer.recipe import Recipe
from trainer.telemetry.step_report import StepReport
from trainer.training.trainer import Trainer


@dataclass(frozen=True)
class Training:
    """A Trainer, and what is looked at or changed around it."""

    trainer: Trainer

    @property
    def model(self) -> Any:
        return self.trainer.model

    @property
    def engine(self) -> Any:
        return self.trainer.engine

    @property
    def router_stats(self) -> Any:
        return self.trainer.router_stats

    def step(self, number: int) -> StepReport:
        """Optimizer step `number`, from 1; every rank calls it."""
        self.trainer.state.step = number - 1
        return self.trainer.train_step(self.trainer.next_input())

    def held_out_losses(self) -> TaskLosses:
        return self.trainer.held_out_loss()

    def measure_routers_every(self, steps: int) -> None:
        self.trainer.router_every = steps

    def saver(self) -> AsyncSaver:
        return AsyncSaver(TrainedState(self.engine, self.model), timedelta(seconds=60))


def build_training(
    recipe: Recipe, device: torch.device, prepared: PreparedSet, persistence_threshold: int | None = None
) -> Training:
    """Loads, attaches and shards; routers are measured at every step, and every held-out row is used.

    persistence_threshold: elements below which ZeRO-3 keeps a tensor whole; None: that of ds_configs.
    """
    plan = plan_batches(recipe.train.global_batch_size, recipe.train.micro_batch_size, dist.get_world_size())
    config = read_deepspeed_config(recipe, plan)
    if persistence_threshold is not None:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = persistence_threshold
    steps = recipe.train.steps
    groups = shard_groups(recipe, gather_local_ranks(), config)
    shards = sharding_for(config, device, groups.base)
    parallel = parallelize(recipe, open_base(recipe.base), config, shards, groups.adapter, len(prepared.tasks), steps)
    training = Training(Trainer(recipe, parallel, prepared, plan, device, steps))
    training.measure_routers_every(1)
    return training
