"""Training on a tiny base as the train command sets it up; the one place where tests build the training loop."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import trainer.training.train
from tests.support import scene
from trainer.adapters.attach import attach_adapter
from trainer.base.loader import load_opened
from trainer.base.weight_map import open_base
from trainer.checkpoint.async_saver import AsyncSaver
from trainer.checkpoint.trained_state import TrainedState
from trainer.distributed.engine import read_deepspeed_config
from trainer.objective.batches import plan_batches
from trainer.objective.loss import TaskLosses
from trainer.recipe import Recipe
from trainer.training.loop import Parts, StepReport, held_out_losses, run_step
from trainer.training.train import assemble, sharding_for


@dataclass(frozen=True)
class Training:
    """A model under DeepSpeed's engine, and the loop's view of both."""

    model: Any
    parts: Parts

    @property
    def engine(self) -> Any:
        return self.parts.engine

    @property
    def router_stats(self) -> Any:
        return self.parts.router_stats

    def step(self, number: int) -> StepReport:
        """Optimizer step `number`, from 1; every rank calls it."""
        return run_step(self.parts, number)

    def held_out_losses(self) -> TaskLosses:
        return held_out_losses(self.parts)

    def saver(self) -> AsyncSaver:
        return AsyncSaver(TrainedState(self.engine, self.model), timedelta(seconds=60))


def build(recipe: Recipe, device: torch.device, train: list, held_out: list | None = None) -> Training:
    """Loads, attaches and shards as the train command does, except that the adapter's experts already do something."""
    held_out = held_out or []
    plan = plan_batches(recipe.train.global_batch_size, recipe.train.micro_batch_size, dist.get_world_size())
    config = read_deepspeed_config(recipe, plan)
    loaded = load_opened(open_base(recipe.base), sharding_for(config, device))
    with mock.patch.object(trainer.training.train, "attach_adapter", _attach_awake):
        model, router_stats, engine = assemble(recipe, loaded, config, len(scene.TASKS), recipe.train.steps)
    prepared = scene.prepared(train, held_out)
    return Training(
        model, Parts(engine, router_stats, prepared, plan, device, recipe.run.seed, 1, held_out_rows=len(held_out))
    )


def _attach_awake(*args: Any) -> Any:
    model = attach_adapter(*args)
    scene.wake_experts(model)
    return model
