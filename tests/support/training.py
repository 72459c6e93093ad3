"""Training as the train command sets it up: the one place where tests and benchmarks build the training loop."""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from data_prep.reader import PreparedSet
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

    def with_router_every(self, steps: int) -> "Training":
        """The same training, which measures its routers each so many steps."""
        return replace(self, parts=replace(self.parts, router_every=steps))

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
    base = load_opened(open_base(recipe.base), sharding_for(config, device))
    model, router_stats, engine = assemble(recipe, base, config, len(prepared.tasks), recipe.train.steps)
    seed, held_out_rows = recipe.run.seed, len(prepared.held_out)
    return Training(model, Parts(engine, router_stats, prepared, plan, device, seed, 1, held_out_rows))
