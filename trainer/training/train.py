"""One training run: build its parts, run its steps, publish the adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import PreTrainedModel

from data_prep.reader import PreparedSet, open_prepared
from data_prep.user_error import UserError
from trainer.adapters.adapter_writer import save_adapter
from trainer.adapters.attach import attach_adapter, check_adapter
from trainer.adapters.router_stats import RouterStats
from trainer.base.base_fingerprint import check_base_file, write_base_file
from trainer.base.document_isolation import check_positions
from trainer.base.loader import bytes_to_read, load_opened
from trainer.base.model_config import load_tokenizer
from trainer.base.sharding import ShardingStrategy, Unsharded
from trainer.base.weight_map import OpenedBase, open_base
from trainer.checkpoint.async_saver import AsyncSaver
from trainer.checkpoint.manager import FOLDER, CheckpointManager, find_best
from trainer.checkpoint.storage import folder_name, sweep
from trainer.checkpoint.trained_state import TrainedState
from trainer.distributed.autotune import autotune
from trainer.distributed.deepspeed_config import check_config
from trainer.distributed.engine import (
    check_optimizer,
    gather_trainable,
    initialize,
    read_deepspeed_config,
    use_deterministic_kernels,
)
from trainer.distributed.expert_groups import check_expert_parallel, make_groups, tag_experts
from trainer.distributed.expert_parallel import ExpertParallel
from trainer.distributed.process_group import (
    process_group,
    raise_on_all_ranks,
    set_collective_timeout,
    translate_peer_errors,
)
from trainer.distributed.rank_check import RankFacts, check_ranks_agree, describe, gather_rank_facts
from trainer.distributed.zero3_sharding import Zero3Sharding
from trainer.errors import TrainingFault
from trainer.objective.batches import BatchPlan, plan_batches, steps_in
from trainer.objective.loss import LabelledLoss
from trainer.recipe import Recipe, TrainConfig
from trainer.run import run_dir
from trainer.run.stop_signal import StopSignal
from trainer.telemetry.progress import LoadProgress
from trainer.telemetry.startup import StartupTimer, describe_run
from trainer.training.loop import Parts
from trainer.training.resume import ResumePoint, check_same_base_and_data, find_resume_point
from trainer.training.steps import Course


@dataclass(frozen=True)
class _Checked:
    """All that can be known, and refused, before weights are read."""

    plan: BatchPlan
    config: dict[str, Any]
    opened: OpenedBase
    prepared: PreparedSet
    steps: int


def train(recipe: Recipe, stop: StopSignal) -> None:
    """Runs the recipe on the ranks that the launcher started, and leaves run.output_dir/run.name.

    Raises on every rank: UserError for a person's mistake, TrainingFault where training cannot go on, Stopped where
    `stop` has heard a signal and the run has saved where it stands.
    """
    clock = StartupTimer()
    if recipe.run.deterministic:
        use_deterministic_kernels()
    with process_group(timedelta(seconds=recipe.run.start_timeout)) as device:
        met = clock.lap("process group")
        with translate_peer_errors("starting"):
            ranks = gather_rank_facts(recipe)
            with raise_on_all_ranks():
                check_ranks_agree(ranks, recipe.run.nodes)
            if dist.get_rank() == 0:
                print(describe(ranks, met), flush=True)
            _train(recipe, stop, device, clock, ranks)


def _train(
    recipe: Recipe, stop: StopSignal, device: torch.device, clock: StartupTimer, ranks: Sequence[RankFacts]
) -> None:
    first = dist.get_rank() == 0
    with raise_on_all_ranks():
        found = find_resume_point(recipe) if first else None
    resume_point = _from_first_rank(found)
    if resume_point.finished:
        if first:
            print(f"{recipe.run.directory} is finished: nothing to do; see {recipe.run.directory / run_dir.ADAPTER}")
        return
    with raise_on_all_ranks():
        checked = _check(recipe, [rank.local_rank for rank in ranks])
    plan, config, prepared = checked.plan, checked.config, checked.prepared
    fingerprint = checked.opened.fingerprint
    fixed = {
        "recipe": recipe.model_dump(mode="json"),
        "world_size": plan.world_size,
        "base_fingerprint": fingerprint,
        "prepared_key": prepared.manifest["key"],
    }
    with raise_on_all_ranks():
        check_same_base_and_data(resume_point, fixed)
        if first:
            found = {"world_size": plan.world_size, "device": str(device), "base_fingerprint": fingerprint}
            run_dir.create(recipe, {**found, "step": resume_point.step})
            sweep(recipe.run.directory / FOLDER)
    if first and (notes := [*resume_point.notes, *_beyond_positions(recipe, checked.opened)]):
        print("\n".join(notes), flush=True)
    clock.lap("checks")
    base = _load(checked.opened, sharding_for(config, device), show=first)
    clock.lap("base")
    model, router_stats, engine = assemble(recipe, base, config, len(prepared.tasks), checked.steps)
    clock.lap("adapter and engine")
    held_out_rows = min(recipe.train.eval_rows or len(prepared.held_out), len(prepared.held_out))
    parts = Parts(
        engine, router_stats, prepared, plan, device, recipe.run.seed, recipe.report.router_every, held_out_rows
    )
    if first:
        mean_row = prepared.manifest["splits"]["train"]["tokens"] / len(prepared.train)
        print(describe_run(model, engine, plan, checked.steps, recipe.run.directory, mean_row), flush=True)
    saver = AsyncSaver(TrainedState(engine, model), timedelta(seconds=recipe.run.collective_timeout))
    checkpoints = CheckpointManager(saver, recipe.run.directory / FOLDER, recipe.checkpoint)
    if resume_point.checkpoint is not None:
        restore(resume_point, saver, engine, router_stats)
        clock.lap("checkpoint")
    set_collective_timeout(timedelta(seconds=recipe.run.collective_timeout))
    Course(recipe, parts, checked.steps, resume_point, checkpoints, stop, fixed).run(clock)
    with translate_peer_errors("after the last step"):
        if recipe.checkpoint.load_best_at_end:
            _back_to_best(checkpoints)
        parameters = gather_trainable(model)
        with raise_on_all_ranks():
            if first:
                record_base = partial(write_base_file, model=recipe.base.model, found=fingerprint)
                _publish(model, parameters, recipe.run.directory / run_dir.ADAPTER, record_base)
        dist.barrier()  # no rank leaves, and so ends the launch, before the adapter is there


def _check(recipe: Recipe, local_ranks: list[int]) -> _Checked:
    train = recipe.train
    plan = plan_batches(train.global_batch_size, train.micro_batch_size, dist.get_world_size())
    config = read_deepspeed_config(recipe, plan)
    check_config(config, recipe.deepspeed.config)
    check_expert_parallel(recipe.experts, local_ranks, config, recipe.deepspeed.config)
    check_optimizer(train)
    opened = open_base(recipe.base)
    check_adapter(opened.model, recipe.adapter)
    if recipe.adapter.init_from is not None:
        check_base_file(recipe.adapter.init_from, recipe.base.model, opened.fingerprint)
    prepared = open_prepared(recipe.data, load_tokenizer(recipe.base, recipe.data.chat_template))
    steps = train.steps or steps_in(train.epochs, len(prepared.train), train.global_batch_size)
    _check_warm_up(train, steps)
    check_positions(opened.model.config, recipe.data.seq_len)
    _check_held_out(recipe, len(prepared.held_out))
    return _Checked(plan, config, opened, prepared, steps)


def _beyond_positions(recipe: Recipe, opened: OpenedBase) -> list[str]:
    most = getattr(opened.model.config, "max_position_embeddings", None)
    if most is None or recipe.data.seq_len <= most:
        return []
    return [
        f"warning: data.seq_len={recipe.data.seq_len}, but base.model was made for {most} positions "
        "(max_position_embeddings); later ones may make no sense to it"
    ]


def _check_warm_up(train: TrainConfig, steps: int) -> None:
    if train.warmup_steps is not None and train.warmup_steps >= steps:
        raise UserError(
            f"train.warmup_steps={train.warmup_steps}: the run has {steps} steps, so it would end before the learning "
            "rate is reached; lower it"
        )


def _check_held_out(recipe: Recipe, rows: int) -> None:
    wanting = {
        "train.early_stopping_patience": recipe.train.early_stopping_patience,
        "checkpoint.load_best_at_end": recipe.checkpoint.load_best_at_end or None,
    }
    for key, value in wanting.items():
        if value is not None and not rows:
            raise UserError(
                f"{key}={value} needs held-out losses, but {recipe.data.prepared_dir} has no held-out rows; prepare "
                "with a larger data.held_out, or remove it"
            )


def _load(opened: OpenedBase, shards: ShardingStrategy, show: bool) -> PreTrainedModel:
    progress = LoadProgress(bytes_to_read(opened, shards), enabled=show)
    try:
        return load_opened(opened, shards, progress)
    finally:
        progress.close()


def sharding_for(config: dict[str, Any], device: torch.device) -> ShardingStrategy:
    """Where the base goes under this DeepSpeed configuration: sharded over the ranks by ZeRO-3, else whole on each."""
    return Zero3Sharding(config, device) if config["zero_optimization"].get("stage") == 3 else Unsharded(device)


def assemble(
    recipe: Recipe, base: PreTrainedModel, config: dict[str, Any], num_tasks: int, steps: int
) -> tuple[PeftModel, RouterStats, Any]:
    """The adapted model, its routers, and DeepSpeed's engine around its `LabelledLoss`, in training mode."""
    torch.manual_seed(recipe.run.seed)  # alike on every rank: initial values must be
    model = attach_adapter(base, recipe.adapter)
    router_stats = RouterStats(model, num_tasks)
    placement = None
    if recipe.experts.parallel_size > 1:
        placement = ExpertParallel(model, make_groups(recipe.experts), recipe.experts.dispatch)
        tag_experts(placement.by_expert, recipe.experts.parallel_size)
    if recipe.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = initialize(LabelledLoss(model, router_stats, num_tasks).train(), recipe.train, config, steps)
    if placement is not None:
        if recipe.experts.dispatch == "auto":
            autotune(placement)
        if dist.get_rank() == 0:
            print(f"experts         {placement.describe()}", flush=True)
    return model, router_stats, engine


def restore(resume_point: ResumePoint, saver: AsyncSaver, engine: Any, router_stats: RouterStats) -> None:
    """Puts the run where its checkpoint was; every rank takes part. Raises UserError where its tensors do not fit."""
    with raise_on_all_ranks():
        problem = saver.check(resume_point.checkpoint) if dist.get_rank() == 0 else None
        if problem is not None:
            raise UserError(f"train.resume: {resume_point.checkpoint} is of another adapter ({problem}); remove it")
    saver.restore(resume_point.checkpoint, resume_point.step)
    engine.lr_scheduler.load_state_dict(resume_point.facts["scheduler"])
    for group, rate in zip(engine.basic_optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    router_stats.means.copy_(torch.tensor(resume_point.facts["router_means"]))


def _publish(model: PeftModel, parameters: dict[str, torch.Tensor], folder: Path, also: Callable[[Path], None]) -> None:
    try:
        save_adapter(model, parameters, folder, also)
    except OSError as error:
        raise TrainingFault(
            f"all steps are done, and {folder} cannot be written ({error.strerror}); make room and start again: the "
            "run goes on from its newest checkpoint"
        ) from error
    print(f"adapter         {folder}", flush=True)


def _back_to_best(checkpoints: CheckpointManager) -> None:
    """Puts back what the step with the least held-out loss had trained, if it can be read; every rank takes part."""
    first = dist.get_rank() == 0
    step, told = _from_first_rank(find_best(checkpoints.folder) if first else None)
    if first:
        print(told, flush=True)
    if step is not None:
        checkpoints.saver.restore(checkpoints.folder / folder_name(step), step)


def _from_first_rank(value: Any) -> Any:
    """Rank 0's value on every rank; every rank takes part."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
