"""The one place where a model is distributed over ranks, in the order in which it must happen."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from trainer.adapters.attach import attach_adapter
from trainer.adapters.router_stats import RouterStats
from trainer.base.loader import load_opened
from trainer.base.sharding import ShardingStrategy
from trainer.base.weight_map import OpenedBase
from trainer.distributed.accumulation import GradientAccumulation
from trainer.distributed.adapter_groups import make_adapter_groups, tag_for_zero3
from trainer.distributed.autotune import autotune
from trainer.distributed.deepspeed_internals import offload_checkpoints
from trainer.distributed.engine import initialize
from trainer.distributed.expert_parallel import ExpertParallel, gathers_by_layer
from trainer.distributed.zero3_sharding import Zero3Sharding
from trainer.objective.loss import LabelledLoss, loss_chunk
from trainer.recipe import Recipe


@dataclass(frozen=True)
class ParallelModel:
    """A model as it is trained: base and adapter, its routers, DeepSpeed's engine around a `LabelledLoss` of it.

    expert_parallel: None where ZeRO-3's hooks gather the adapter, or nothing does. saved_activations: surrounds the
    forward and backward of each micro-batch.
    """

    model: PeftModel
    router_stats: RouterStats
    engine: Any
    expert_parallel: ExpertParallel | None
    accumulation: GradientAccumulation
    saved_activations: AbstractContextManager


def parallelize(
    recipe: Recipe,
    opened: OpenedBase,
    config: dict[str, Any],
    shards: ShardingStrategy,
    adapter_group: int,
    num_tasks: int,
    steps: int,
    progress: Callable[[int], None] = lambda _: None,
    base_loaded: Callable[[], None] = lambda: None,
) -> ParallelModel:
    """Loads and distributes what the recipe trains, in training mode. Collective: every rank must call it.

    config: DeepSpeed's, filled. shards: of the base. adapter_group: ranks among which one copy of the adapter is
    divided. steps: of the whole run, for the learning rate. progress: receives
    the bytes read of the base so far. base_loaded: is called once the base is there.
    """
    # The base first, already in shards: it must not be whole on any rank, not even while it is loaded.
    base = load_opened(opened, shards, progress)
    base_loaded()
    # Initial values come from torch's generator, which must stand at the same place on every rank.
    torch.manual_seed(recipe.run.seed)
    # The adapter is still whole here; it takes device and dtype from the base.
    model = attach_adapter(base, recipe.adapter)
    # Before placement, which takes away the whole parameters whose shapes are read here.
    router_stats = RouterStats(model, num_tasks)
    groups = make_adapter_groups(recipe.experts, adapter_group)
    by_layer = gathers_by_layer(recipe, config["zero_optimization"].get("stage"), groups)
    expert_parallel = ExpertParallel(model, groups, recipe.experts.dispatch) if by_layer else None
    by_expert = expert_parallel.by_expert if expert_parallel is not None else []
    placed = set(by_expert)
    shared = [p for p in model.parameters() if p.requires_grad and p not in placed]
    # Before DeepSpeed sees the parameters: it partitions them over the group that a tag names.
    tag_for_zero3(groups, by_expert, shared)
    # Before DeepSpeed sees the modules; without re-entrance, since ZeRO-3's hooks must run in the recomputed forward.
    if recipe.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # The loss is part of the module, so that its choice of positions lies within the forward that ZeRO-3 traces.
    chunk = loss_chunk(recipe, base.config.get_text_config().vocab_size)
    engine = initialize(LabelledLoss(model, router_stats, num_tasks, chunk).train(), recipe.train, config, steps)
    # After ZeRO-3's hooks.
    offloads = recipe.train.activation_checkpointing == "offload"
    saved_activations = offload_checkpoints(engine.module) if offloads else nullcontext()
    # Last: it measures with the shards that ZeRO-3 has made.
    if expert_parallel is not None and expert_parallel.dispatch == "auto":
        autotune(expert_parallel)
    divided = [(by_expert, groups.experts), (shared, groups.shared)]
    accumulation = GradientAccumulation(engine, config["gradient_accumulation_steps"], divided)
    return ParallelModel(model, router_stats, engine, expert_parallel, accumulation, saved_activations)


def shard_for_inference(opened: OpenedBase, config: dict[str, Any], shards: Zero3Sharding) -> PreTrainedModel:
    """The bare base in shards of ZeRO-3, in eval mode. Collective: every rank must call it.

    Each forward gathers one layer's parameters at a time: every rank must make as many forwards as the others, or they
    wait forever. An adapter that is attached afterwards is whole on every rank.
    """
    import deepspeed

    base = load_opened(opened, shards)
    engine, *_ = deepspeed.initialize(model=base, config=config)
    return engine.module.eval()
