"""One training run: build its parts, run its steps, publish the adapter."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import PreTrainedModel

from data_prep.reader import PreparedSet, open_prepared
from trainer import rundir
from trainer.adapters.attach import attach_adapter, check_adapter
from trainer.adapters.calibrate import calibrate
from trainer.adapters.placement import Placement
from trainer.adapters.routing import Routing
from trainer.adapters.save import save_adapter
from trainer.base.fingerprint import check_base_file, write_base_file
from trainer.base.load import bytes_to_read, load_opened
from trainer.base.match import OpenedBase, open_base
from trainer.base.shards import Shards, Whole
from trainer.base.source import load_tokenizer
from trainer.base.zero3 import ZeroShards, check_config
from trainer.batches import BatchPlan, plan_batches, steps_in
from trainer.engine import (
    agreeing,
    check_optimizer,
    gather_trainable,
    initialize,
    naming_lost_ranks,
    process_group,
    read_deepspeed_config,
)
from trainer.expert_groups import check_placement, everyones_local_rank, make_groups, tag_experts
from trainer.loop import Parts, held_out_losses, run_step
from trainer.loss import LabelledLoss
from trainer.recipe import Recipe
from trainer.report.facts import StartClock, describe_run
from trainer.report.metrics import MetricsWriter, step_record
from trainer.report.progress import LoadProgress, StepProgress


@dataclass(frozen=True)
class _Checked:
    """All that can be known, and refused, before weights are read."""

    plan: BatchPlan
    config: dict[str, Any]
    opened: OpenedBase
    prepared: PreparedSet
    steps: int


def train(recipe: Recipe) -> None:
    """Runs the recipe on the ranks that the launcher started, and leaves run.output_dir/run.name.

    Raises UserError on every rank for a person's mistake, TrainingFault for a loss or gradient that is not finite.
    """
    clock = StartClock()
    with process_group() as device:
        clock.lap("process group")
        _train(recipe, device, clock)


def _train(recipe: Recipe, device: torch.device, clock: StartClock) -> None:
    first = dist.get_rank() == 0
    with agreeing():
        finished = rundir.is_finished(recipe) if first else False
    if _from_first_rank(finished):
        if first:
            print(f"{recipe.run.directory} is finished: nothing to do; see {recipe.run.directory / rundir.ADAPTER}")
        return
    local_ranks = everyones_local_rank()
    with agreeing():
        checked = _check(recipe, local_ranks)
    plan, config, prepared = checked.plan, checked.config, checked.prepared
    fingerprint = checked.opened.fingerprint
    with agreeing():
        if first:
            found = {"world_size": plan.world_size, "device": str(device), "base_fingerprint": fingerprint}
            rundir.create(recipe, found)
    clock.lap("checks")
    base = _load(checked.opened, shards_for(config, device), show=first)
    clock.lap("base")
    model, routing, engine = assemble(recipe, base, config, len(prepared.tasks), checked.steps)
    clock.lap("adapter and engine")
    held_out_rows = min(recipe.train.eval_rows or len(prepared.held_out), len(prepared.held_out))
    parts = Parts(engine, routing, prepared, plan, device, recipe.run.seed, recipe.report.router_every, held_out_rows)
    if first:
        mean_row = prepared.manifest["splits"]["train"]["tokens"] / len(prepared.train)
        print(describe_run(model, engine, plan, checked.steps, recipe.run.directory, mean_row), flush=True)
    _run(recipe, parts, checked.steps, clock)
    parameters = gather_trainable(model)
    if first:
        record_base = partial(write_base_file, model=recipe.base.model, found=fingerprint)
        save_adapter(model, parameters, recipe.run.directory / rundir.ADAPTER, also=record_base)
        print(f"adapter         {recipe.run.directory / rundir.ADAPTER}", flush=True)
    dist.barrier()  # no rank leaves, and so ends the launch, before the adapter is there


def _check(recipe: Recipe, local_ranks: list[int]) -> _Checked:
    train = recipe.train
    plan = plan_batches(train.global_batch_size, train.micro_batch_size, dist.get_world_size())
    config = read_deepspeed_config(recipe, plan)
    if config["zero_optimization"].get("stage") == 3:
        check_config(config, recipe.deepspeed.config)
    check_placement(recipe.experts, local_ranks, config, recipe.deepspeed.config)
    check_optimizer(train)
    opened = open_base(recipe.base)
    check_adapter(opened.model, recipe.adapter)
    if recipe.adapter.init_from is not None:
        check_base_file(recipe.adapter.init_from, recipe.base.model, opened.fingerprint)
    prepared = open_prepared(recipe.data, load_tokenizer(recipe.base))
    steps = train.steps or steps_in(train.epochs, len(prepared.train), train.global_batch_size)
    return _Checked(plan, config, opened, prepared, steps)


def _load(opened: OpenedBase, shards: Shards, show: bool) -> PreTrainedModel:
    progress = LoadProgress(bytes_to_read(opened, shards), enabled=show)
    try:
        return load_opened(opened, shards, progress)
    finally:
        progress.close()


def shards_for(config: dict[str, Any], device: torch.device) -> Shards:
    """Where the base goes under this DeepSpeed configuration: sharded over the ranks by ZeRO-3, else whole on each."""
    return ZeroShards(config, device) if config["zero_optimization"].get("stage") == 3 else Whole(device)


def assemble(
    recipe: Recipe, base: PreTrainedModel, config: dict[str, Any], num_tasks: int, steps: int
) -> tuple[PeftModel, Routing, Any]:
    """The adapted model, its routers, and DeepSpeed's engine around its `LabelledLoss`, in training mode."""
    torch.manual_seed(recipe.run.seed)  # alike on every rank: initial values must be
    model = attach_adapter(base, recipe.adapter)
    routing = Routing(model)
    placement = None
    if recipe.experts.parallel_size > 1:
        placement = Placement(model, make_groups(recipe.experts), recipe.experts.dispatch)
        tag_experts(placement.by_expert, recipe.experts.parallel_size)
    if recipe.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = initialize(LabelledLoss(model, routing, num_tasks).train(), recipe.train, config, steps)
    if placement is not None:
        if recipe.experts.dispatch == "auto":
            calibrate(placement)
        if dist.get_rank() == 0:
            print(f"experts         {placement.describe()}", flush=True)
    torch.manual_seed(recipe.run.seed + dist.get_rank())  # from here on dropout, which differs by rank
    return model, routing, engine


def _run(recipe: Recipe, parts: Parts, steps: int, clock: StartClock) -> None:
    first = dist.get_rank() == 0
    writer = MetricsWriter(recipe.run.directory, recipe.report.tensorboard) if first else None
    progress = StepProgress(steps, enabled=first)
    try:
        for step in range(1, steps + 1):
            with naming_lost_ranks(f"step {step}"):
                report = run_step(parts, step)
            if step == 1:
                clock.lap("first step")
                if first:
                    print(clock, flush=True)
            due = step == steps or (recipe.train.eval_every and step % recipe.train.eval_every == 0)
            with naming_lost_ranks(f"held-out loss after step {step}"):
                held_out = held_out_losses(parts) if due and parts.held_out_rows else None
            if writer is not None:
                record = step_record(report, parts.prepared.tasks, held_out)
                writer.write(record)
                progress.show(record)
    finally:
        progress.close()
        if writer is not None:
            writer.close()


def _from_first_rank(value: bool) -> bool:
    """Rank 0's value on every rank; every rank takes part."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
