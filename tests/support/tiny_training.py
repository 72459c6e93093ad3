"""Training on a tiny base as the train command sets it up; the one place where tests build the training loop."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import trainer.distributed.parallelize
from tests.support import scene
from trainer.adapters.attach import attach_adapter
from trainer.base.weight_map import open_base
from trainer.checkpoint.async_saver import AsyncSaver
from trainer.checkpoint.trained_state import TrainedState
from trainer.distributed.deepspeed_config import read_deepspeed_config
from trainer.distributed.parallelize import parallelize
from trainer.objective.batches import plan_batches
from trainer.objective.loss import TaskLosses
from trainer.recipe import Recipe
from trainer.telemetry.step_report import StepReport
from trainer.training.trainer import Trainer


@dataclass(frozen=True)
class Training:
    """A model under DeepSpeed's engine, and the Trainer around both. Routers are measured in every step."""

    model: Any
    trainer: Trainer

    @property
    def engine(self) -> Any:
        return self.trainer.engine

    @property
    def router_stats(self) -> Any:
        return self.trainer.router_stats

    def step(self, number: int) -> StepReport:
        """Optimizer step `number`, from 1; every rank calls it."""
        self.trainer.state.step = number - 1
        return self.trainer.train_step()

    def held_out_losses(self) -> TaskLosses:
        return self.trainer.held_out_loss()

    def saver(self) -> AsyncSaver:
        return AsyncSaver(TrainedState(self.engine, self.model), timedelta(seconds=60))


def build(recipe: Recipe, device: torch.device, train: list, held_out: list | None = None) -> Training:
    """Loads, attaches and shards as the train command does, except that the adapter's experts already do something."""
    plan = plan_batches(recipe.train.global_batch_size, recipe.train.micro_batch_size, dist.get_world_size())
    config = read_deepspeed_config(recipe, plan)
    with mock.patch.object(trainer.distributed.parallelize, "attach_adapter", _attach_awake):
        parallel = parallelize(recipe, open_base(recipe.base), config, device, len(scene.TASKS), recipe.train.steps)
    prepared = scene.prepared(train, held_out or [])
    built = Trainer(recipe, parallel, prepared, plan, device, recipe.train.steps)
    built.router_every = 1
    return Training(parallel.model, built)


def _attach_awake(*args: Any) -> Any:
    model = attach_adapter(*args)
    scene.wake_experts(model)
    return model
