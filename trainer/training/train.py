"""`teamlora train`: one run from its recipe to its adapter, on the ranks that a launcher started."""

import contextlib
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.publish import blame_option
from trainer.adapters.adapter_folder import save_adapter
from trainer.base.base_fingerprint import write_base_file
from trainer.base.loader import bytes_to_read
from trainer.checkpoint.async_saver import AsyncSaver
from trainer.checkpoint.manager import FOLDER, CheckpointManager, find_best
from trainer.checkpoint.storage import check_folder, folder_name, steps_in, sweep
from trainer.checkpoint.trained_state import TrainedState
from trainer.distributed.engine import gather_trainable
from trainer.distributed.parallelize import ParallelModel, parallelize
from trainer.distributed.process_group import process_group, set_collective_timeout, translate_peer_errors
from trainer.distributed.rank_check import (
    RankFacts,
    broadcast_from_rank_0,
    check_ranks_agree,
    describe,
    gather_rank_facts,
    raise_on_all_ranks,
)
from trainer.distributed.zero3_sharding import sharding_for
from trainer.errors import TrainingFault
from trainer.recipe import Recipe
from trainer.run import run_dir
from trainer.run.lease import RunLease
from trainer.run.stop_signal import StopSignal
from trainer.telemetry.progress import LoadProgress
from trainer.telemetry.run_log import RunLog
from trainer.telemetry.startup import StartupTimer, describe_run
from trainer.training.randomness import use_deterministic_kernels
from trainer.training.resume import (
    ResumePoint,
    check_same_base_and_data,
    contents,
    find_again_if_changed,
    find_resume_point,
    restore,
)
from trainer.training.run_plan import RunPlan, plan_run, warnings_about
from trainer.training.trainer import Trainer, TrainState


def train(recipe: Recipe, stop: StopSignal) -> None:
    """Runs the recipe and leaves run.output_dir/run.name.

    Raises on every rank: UserError for a user's mistake, TrainingFault where training cannot go on, Stopped where
    `stop` has received a signal and the run has saved its state.
    """
    timer = StartupTimer()
    if recipe.run.deterministic:
        use_deterministic_kernels()
    with process_group(timedelta(seconds=recipe.run.start_timeout)) as device:
        met = timer.lap("process group")
        with translate_peer_errors("starting"):
            ranks = gather_rank_facts(recipe, device)
            with raise_on_all_ranks():
                check_ranks_agree(ranks, recipe.run.nodes)
            if dist.get_rank() == 0:
                print(describe(ranks, met), flush=True)
            _train(recipe, stop, device, timer, ranks)


def _train(
    recipe: Recipe, stop: StopSignal, device: torch.device, timer: StartupTimer, ranks: Sequence[RankFacts]
) -> None:
    first = dist.get_rank() == 0
    directory = recipe.run.directory
    with raise_on_all_ranks():
        before = contents(directory) if first else {}
        found = find_resume_point(recipe) if first else None
    resume_point: ResumePoint = broadcast_from_rank_0(found)
    if resume_point.finished:
        return _report_finished(directory)
    with raise_on_all_ranks():
        plan = plan_run(recipe, [rank.local_rank for rank in ranks])
    identity = plan.identity(recipe)
    with raise_on_all_ranks():
        check_same_base_and_data(resume_point, identity)
    lease = RunLease(directory, recipe.run.start_timeout if len(ranks) > 1 else math.inf)
    with contextlib.ExitStack() as held:
        with raise_on_all_ranks():
            if first:
                with run_dir.refuse_unwritable(recipe):
                    held.enter_context(lease.held())
                resume_point = find_again_if_changed(resume_point, before, recipe, identity)
                if not resume_point.finished:
                    _begin_run_dir(recipe, plan, device, resume_point)
        resume_point = broadcast_from_rank_0(resume_point)
        if resume_point.finished:
            return _report_finished(directory)
        timer.lap("checks")
        _load_and_fit(recipe, plan, resume_point, lease.check, stop, device, timer, [rank.host for rank in ranks])


def _report_finished(directory: Path) -> None:
    if dist.get_rank() == 0:
        print(f"{directory} is finished: nothing to do; see {directory / run_dir.ADAPTER}")


def _load_and_fit(
    recipe: Recipe,
    plan: RunPlan,
    resume_point: ResumePoint,
    before_write: Callable[[], None],
    stop: StopSignal,
    device: torch.device,
    timer: StartupTimer,
    hosts: Sequence[str],
) -> None:
    """From the base to the published adapter. before_write: is called on rank 0 before each write into the folder."""
    first = dist.get_rank() == 0
    directory = recipe.run.directory
    parallel = _load(recipe, plan, device, timer)
    state = TrainState.from_facts(resume_point.facts, recipe.train.eval_rows)
    trainer = Trainer(recipe, parallel, plan.prepared, plan.batches, device, plan.total_steps, state, hosts)
    if first:
        mean_row = plan.prepared.manifest["splits"]["train"]["tokens"] / len(plan.prepared.train)
        print(describe_run(parallel, plan.batches, plan.total_steps, directory, mean_row), flush=True)
    saver = AsyncSaver(TrainedState(parallel.engine, parallel.model), timedelta(seconds=recipe.run.collective_timeout))
    checkpoints = CheckpointManager(saver, directory / FOLDER, recipe.checkpoint, before_write)
    if resume_point.checkpoint is not None:
        restore(resume_point, saver, trainer)
        timer.lap("checkpoint")
    set_collective_timeout(timedelta(seconds=recipe.run.collective_timeout))

    log = RunLog(
        directory,
        plan.prepared.tasks,
        plan.total_steps,
        recipe.report.tensorboard,
        enabled=first,
        done=resume_point.step,
        own=resume_point.is_of(directory),
        before_write=before_write,
        passed_over=any(step > resume_point.step for step in steps_in(directory / FOLDER)),
    )
    with log:
        trainer.fit(checkpoints, log, stop, plan.identity(recipe), after_first_step=partial(_report_startup, timer))
    with translate_peer_errors("after the last step"):
        if recipe.checkpoint.load_best_at_end:
            _restore_best(checkpoints)
        _publish_adapter(recipe, plan, parallel, before_write)
        dist.barrier()  # no rank leaves, and so ends the launch, before the adapter is there


def _begin_run_dir(recipe: Recipe, plan: RunPlan, device: torch.device, resume_point: ResumePoint) -> None:
    """On rank 0."""
    facts = {
        "world_size": plan.batches.world_size,
        "device": str(device),
        "base_fingerprint": plan.opened.fingerprint,
        "prepared_key": plan.prepared.manifest["key"],
        "step": resume_point.step,
    }
    checkpoints = recipe.run.directory / FOLDER
    with blame_option(f"run.output_dir={recipe.run.output_dir}", checkpoints):
        check_folder(checkpoints)
    run_dir.create(recipe, facts)
    sweep(checkpoints)
    if notes := [*resume_point.notes, *warnings_about(recipe, plan.opened)]:
        print("\n".join(notes), flush=True)


def _load(recipe: Recipe, plan: RunPlan, device: torch.device, timer: StartupTimer) -> ParallelModel:
    first = dist.get_rank() == 0
    shards = sharding_for(plan.config, device, plan.groups.base)
    progress = LoadProgress(bytes_to_read(plan.opened, shards.world), enabled=first)

    def base_loaded() -> None:
        progress.close()
        timer.lap("base")

    try:
        parallel = parallelize(
            recipe,
            plan.opened,
            plan.config,
            shards,
            plan.groups.adapter,
            len(plan.prepared.tasks),
            plan.total_steps,
            progress,
            base_loaded,
        )
    finally:
        progress.close()
    timer.lap("adapter and engine")
    if first and parallel.expert_parallel is not None and recipe.experts.parallel_size > 1:
        print(f"experts         {parallel.expert_parallel.describe()}", flush=True)
    return parallel


def _report_startup(timer: StartupTimer) -> None:
    timer.lap("first step")
    if dist.get_rank() == 0:
        print(timer, flush=True)


def _restore_best(checkpoints: CheckpointManager) -> None:
    """Restores what the step with the lowest held-out loss had trained, if it can be read. Collective."""
    first = dist.get_rank() == 0
    step, line = broadcast_from_rank_0(find_best(checkpoints.folder) if first else None)
    if first:
        print(line, flush=True)
    if step is not None:
        checkpoints.saver.restore(checkpoints.folder / folder_name(step), step)


def _publish_adapter(recipe: Recipe, plan: RunPlan, parallel: ParallelModel, before_write: Callable[[], None]) -> None:
    """Writes the run's adapter/ from rank 0. Collective."""
    parameters = gather_trainable(parallel.model)
    folder = recipe.run.directory / run_dir.ADAPTER
    record_base = partial(write_base_file, model=recipe.base.model, found=plan.opened.fingerprint)
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            before_write()
            _write(parallel, parameters, folder, record_base)


def _write(parallel: ParallelModel, parameters: dict[str, torch.Tensor], folder: Path, record_base: partial) -> None:
    try:
        save_adapter(parallel.model, parameters, folder, record_base)
    except OSError as error:
        raise TrainingFault(
            f"all steps are done, and {folder} cannot be written ({error.strerror}); make room and start again: the "
            "run resumes from its newest checkpoint"
        ) from error
    print(f"adapter         {folder}", flush=True)
