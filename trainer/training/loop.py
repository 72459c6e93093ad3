"""One optimizer step and its order of events, and the held-out loss."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_prep.reader import PreparedSet
from trainer.adapters.router_stats import RouterReport, RouterStats
from trainer.distributed.engine import NonFiniteGradient, apply_gradients
from trainer.errors import TrainingFault
from trainer.objective.batches import Batch, BatchPlan, collate, empty_batch, micro_batches_of, rows_of_step
from trainer.objective.loss import TaskLosses, count_tokens
from trainer.training.nonfinite import find_nonfinite_layers


@dataclass(frozen=True)
class Parts:
    """What a training loop works with; `engine` is DeepSpeed's, around a `LabelledLoss`."""

    engine: Any
    router_stats: RouterStats
    prepared: PreparedSet
    plan: BatchPlan
    device: torch.device
    seed: int
    router_every: int
    held_out_rows: int


@dataclass(frozen=True)
class StepReport:
    """One optimizer step over the global batch.

    losses: sums by task. tokens: real ones, labelled ones included. seconds: wall time. router: None where routers
    were not measured.
    """

    step: int
    losses: TaskLosses
    learning_rate: float
    grad_norm: float
    labelled_tokens: int
    tokens: int
    seconds: float
    router: RouterReport | None


def run_step(parts: Parts, step: int) -> StepReport:
    """Optimizer step `step` (from 1) on its rows.

    Every rank calls it for the same steps. Raises TrainingFault on a loss or gradient that is not finite.
    """
    started = time.perf_counter()
    engine, router_stats, plan = parts.engine, parts.router_stats, parts.plan
    _seed_dropout(parts.seed, step)
    batches = [_to(batch, parts.device) for batch in _batches_of_step(parts, step)]
    labelled_tokens, tokens = _sum_over_ranks(count_tokens(batches), parts.device)
    learning_rate = engine.get_lr()[0]
    router_stats.begin_step(tokens, measure=step % parts.router_every == 0)
    scale = float(plan.world_size * plan.gradient_accumulation_steps)  # what DeepSpeed divides by
    sums = TaskLosses.zeros(len(parts.prepared.tasks), parts.device)
    for batch in batches:
        router_stats.begin_micro_batch(batch["task_ids"])
        loss, by_task = engine(batch, max(labelled_tokens, 1), scale)
        engine.backward(loss)
        router_stats.end_micro_batch()
        sums += by_task
        if engine.is_gradient_accumulation_boundary():
            sums = _checked(sums, parts, step, batches)
        grad_norm = _apply(engine, step, batches)
    return StepReport(
        step=step,
        losses=sums,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        labelled_tokens=labelled_tokens,
        tokens=tokens,
        router=router_stats.end_step(),
        seconds=time.perf_counter() - started,
    )


def _seed_dropout(seed: int, step: int) -> None:
    """Random numbers too are a function of (seed, step), so no generator's state is kept; each rank has its own."""
    (value,) = np.random.SeedSequence([seed, step, dist.get_rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(value))


@torch.no_grad()
def held_out_losses(parts: Parts) -> TaskLosses:
    """Sums of the losses on the first held-out rows, equal on every rank. Leaves the engine in training mode.

    Ranks without a row left still run a forward: under ZeRO-3 each one is a collective.
    """
    engine, plan, rows = parts.engine, parts.plan, parts.prepared.held_out
    engine.eval()
    sums = TaskLosses.zeros(len(parts.prepared.tasks), parts.device)
    unit = plan.micro_batch_size * plan.world_size
    for start in range(0, parts.held_out_rows, unit):
        mine = start + dist.get_rank() * plan.micro_batch_size
        indices = range(mine, min(mine + plan.micro_batch_size, parts.held_out_rows))
        batch = collate([rows[i] for i in indices]) if indices else empty_batch()
        _, by_task = engine(_to(batch, parts.device), 1, 1.0)
        sums += by_task
    engine.train()
    return _reduced(sums)


def _batches_of_step(parts: Parts, step: int) -> Iterator[Batch]:
    rows = parts.prepared.train
    indices = rows_of_step(parts.seed, step - 1, len(rows), parts.plan.global_batch_size)
    for micro_batch in micro_batches_of(indices, parts.plan, dist.get_rank()):
        yield collate([rows[i] for i in micro_batch])


def _checked(sums: TaskLosses, parts: Parts, step: int, batches: list[Batch]) -> TaskLosses:
    """The sums over all ranks; raises TrainingFault, on every rank, where a loss is not finite."""
    total = _reduced(sums)
    if torch.isfinite(total.loss).all():
        return total
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    mine = [t for t, loss in zip(parts.prepared.tasks, sums.loss.tolist(), strict=True) if loss - loss != 0]
    dist.all_gather_object(found, mine)
    where = "; ".join(f"rank {rank}: task {', '.join(tasks)}" for rank, tasks in enumerate(found) if tasks)
    layers = find_nonfinite_layers(parts.engine, batches, backward=False)
    raise TrainingFault(
        f"step {step}: the loss is not finite ({where}); first layer: {layers or 'none, only the loss itself'}; the "
        f"weights are those of step {step - 1}"
    )


def _apply(engine: Any, step: int, batches: list[Batch]) -> float | None:
    try:
        return apply_gradients(engine)
    except NonFiniteGradient:
        layers = find_nonfinite_layers(engine, batches, backward=True)
        raise TrainingFault(
            f"step {step}: the gradient is not finite while the loss is; first at the output of: "
            f"{layers or 'no layer, only in parameters'}; the weights are those of step {step - 1}; lower "
            "train.learning_rate, or set base.dtype: fp32"
        ) from None


def _reduced(sums: TaskLosses) -> TaskLosses:
    """Sums over ranks; every rank takes part."""
    both = torch.stack((sums.loss, sums.labelled_tokens))
    dist.all_reduce(both)
    return TaskLosses(*both)


def _sum_over_ranks(counts: tuple[int, ...], device: torch.device) -> list[int]:
    """Every rank takes part in one small all-reduce."""
    total = torch.tensor(counts, device=device)
    dist.all_reduce(total)
    return total.tolist()


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
