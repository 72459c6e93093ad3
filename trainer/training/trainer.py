"""The training loop: `Trainer.fit` runs the steps of a run in their order, `Trainer.train_step` is one of them."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from data_prep.reader import PreparedSet
from trainer.checkpoint.manager import CheckpointManager
from trainer.distributed.engine import NonFiniteGradient, apply_gradients
from trainer.distributed.parallelize import ParallelModel
from trainer.distributed.process_group import translate_peer_errors
from trainer.errors import Stopped, TrainingFault
from trainer.objective.batches import (
    GPU_MULTIPLE,
    Batch,
    BatchPlan,
    collate,
    count_tokens,
    empty_batch,
    micro_batches_of,
    move,
    rows_of_step,
)
from trainer.objective.loss import TaskLosses
from trainer.recipe import Recipe
from trainer.run.stop_signal import StopSignal
from trainer.telemetry.run_log import RunLog
from trainer.telemetry.slow_ranks import SlowRanks
from trainer.telemetry.step_report import StepReport
from trainer.training.nonfinite import find_nonfinite_layers
from trainer.training.randomness import seed_step

LAST_SAVE = 10.0  # seconds that a save under way gets when an error ends the run


@dataclass
class TrainState:
    """Where a run stands, beside tensors. Equal on every rank.

    step: optimizer steps that are done. saved_step: the newest that a checkpoint holds. best_loss, best_step: of the
    lowest held-out loss. since_best: held-out losses after it.
    """

    step: int = 0
    saved_step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    since_best: int = 0

    @classmethod
    def from_facts(cls, facts: dict[str, Any], eval_rows: int | None) -> "TrainState":
        """From a checkpoint's run.json, {} at the first step. Held-out losses of other rows than now are forgotten."""
        step = facts.get("step", 0)
        if not facts or facts["recipe"]["train"]["eval_rows"] != eval_rows:
            return cls(step, step)
        best = facts.get("held_out", {})
        return cls(step, step, best.get("best_loss"), best.get("best_step"), best.get("since", 0))

    def facts(self) -> dict[str, Any]:
        """For a checkpoint's run.json."""
        best = {"best_loss": self.best_loss, "best_step": self.best_step, "since": self.since_best}
        return {"step": self.step, "held_out": best}

    def add_held_out_loss(self, loss: float) -> bool:
        """Takes the loss after the current step; returns whether it is the lowest so far."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.since_best = loss, self.step, 0
            return True
        self.since_best += 1
        return False


@dataclass(frozen=True)
class StepInput:
    """This rank's micro-batches of one optimizer step, on the CPU, and what the ranks know of all of theirs.

    started: when their making began, as time.perf_counter counts. stop_asked: whether any rank was asked to stop.
    """

    started: float
    batches: list[Batch]
    labelled_tokens: int
    tokens: int
    stop_asked: bool


class Trainer:
    """One run on one rank. Every rank makes the same calls: `fit`, `train_step` and `held_out_loss` are collectives.

    total_steps: at which the run ends. state: where it stands; None: at its beginning. hosts: of each rank, by which
    slow ones are named; without them none is.
    """

    def __init__(
        self,
        recipe: Recipe,
        parallel: ParallelModel,
        prepared: PreparedSet,
        plan: BatchPlan,
        device: torch.device,
        total_steps: int,
        state: TrainState | None = None,
        hosts: Sequence[str] = (),
    ) -> None:
        self.recipe, self.prepared, self.plan, self.device = recipe, prepared, plan, device
        self.model, self.router_stats, self.engine = parallel.model, parallel.router_stats, parallel.engine
        self.accumulation, self.saved_activations = parallel.accumulation, parallel.saved_activations
        self.row_multiple = GPU_MULTIPLE if device.type == "cuda" else 1
        self.total_steps = total_steps
        self.state = state or TrainState()
        self.router_every = recipe.report.router_every
        self.held_out_rows = min(recipe.train.eval_rows or len(prepared.held_out), len(prepared.held_out))
        self.slow_ranks = SlowRanks(parallel.model, device, hosts)

    def fit(
        self,
        checkpoints: CheckpointManager,
        log: RunLog,
        stop: StopSignal,
        identity: dict[str, Any],
        after_first_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Trains to the last step, or until held-out losses no longer fall.

        identity: facts that every checkpoint repeats. Raises, on every rank, TrainingFault where training cannot go on,
        and Stopped when a signal asked for it and the state is saved.
        """
        first = self.state.step + 1
        try:
            while self.state.step < self.total_steps and not self._out_of_patience():
                with translate_peer_errors(f"step {self.state.step + 1}"):
                    given = self.next_input(stop.name is not None)
                if given.stop_asked:
                    self._stop(checkpoints, log, identity)
                with translate_peer_errors(f"step {self.state.step + 1}"):
                    report = self.train_step(given)
                if report.step == first:
                    after_first_step()
                held_out = self._held_out_loss_if_due()
                log.log_step(report, held_out)
                if self._save_is_due(held_out):
                    self._save(checkpoints, log, identity)
            with translate_peer_errors("the last checkpoint"):
                checkpoints.saver.finish()
            log.log_last_images()
        except Stopped:
            raise
        except BaseException:
            checkpoints.saver.abandon(LAST_SAVE)
            raise

    def next_input(self, stop_asked: bool = False) -> StepInput:
        """What the next optimizer step trains on. A signal at any rank is known to all of them afterwards."""
        started = time.perf_counter()
        batches = list(self._batches_of(self.state.step + 1))
        counts = *count_tokens(batches), int(stop_asked)
        labelled_tokens, tokens, asked, *times = self._sum_over_ranks(*counts, *self.slow_ranks.own_time())
        self.slow_ranks.add(times)
        return StepInput(started, batches, labelled_tokens, tokens, asked > 0)

    def train_step(self, given: StepInput) -> StepReport:
        """The next optimizer step. Raises TrainingFault where a loss or gradient is not finite.

        The host waits for a GPU where the loss's sums and the gradient's norm decide how to go on, and nowhere else.
        """
        step = self.state.step + 1
        seed_step(self.recipe.run.seed, step)
        batches = [move(batch, self.device) for batch in given.batches]
        labelled_tokens = given.labelled_tokens
        learning_rate = self.engine.get_lr()[0]
        self.router_stats.begin_step(given.tokens, measure=step % self.router_every == 0)
        scale = float(self.plan.world_size * self.plan.gradient_accumulation_steps)  # what DeepSpeed divides by
        losses = TaskLosses.zeros(len(self.prepared.tasks), self.device)
        with self.accumulation.step():
            for number, batch in enumerate(batches, start=1):
                self.router_stats.begin_micro_batch(batch["task_ids"])
                with self.saved_activations:
                    loss, by_task = self.engine(batch, max(labelled_tokens, 1), scale)
                    self.accumulation.backward(loss, last=number == len(batches))
                self.router_stats.end_micro_batch()
                losses += by_task
        losses = self._finite_total(losses, step, batches)
        grad_norm = self._apply_gradients(step, batches)
        router = self.router_stats.end_step()
        self.state.step = step
        seconds = time.perf_counter() - given.started
        return StepReport(step, losses, learning_rate, grad_norm, labelled_tokens, given.tokens, seconds, router)

    @torch.no_grad()
    def held_out_loss(self) -> TaskLosses:
        """Sums of the losses on the first held-out rows. Leaves the engine in training mode.

        Ranks without a row left still run a forward: under ZeRO-3 each forward is a collective.
        """
        rows, plan = self.prepared.held_out, self.plan
        self.engine.eval()
        sums = TaskLosses.zeros(len(self.prepared.tasks), self.device)
        unit = plan.micro_batch_size * plan.world_size
        for start in range(0, self.held_out_rows, unit):
            mine = start + dist.get_rank() * plan.micro_batch_size
            indices = range(mine, min(mine + plan.micro_batch_size, self.held_out_rows))
            batch = collate([rows[i] for i in indices], self.row_multiple) if indices else empty_batch()
            _, by_task = self.engine(move(batch, self.device), 1, 1.0)
            sums += by_task
        self.engine.train()
        return sums.over_ranks()

    def load_state(self, facts: dict[str, Any]) -> None:
        """Puts schedule and router means where a checkpoint's facts say; tensors are the saver's to restore."""
        self.engine.lr_scheduler.load_state_dict(facts["scheduler"])
        rates = self.engine.lr_scheduler.get_last_lr()
        for group, rate in zip(self.engine.basic_optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.router_stats.means.copy_(torch.tensor(facts["router_means"]))

    def state_facts(self) -> dict[str, Any]:
        """What `load_state` and `TrainState.from_facts` read."""
        return {
            **self.state.facts(),
            "scheduler": self.engine.lr_scheduler.state_dict(),
            "router_means": self.router_stats.means.tolist(),
        }

    def _batches_of(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of one step, on the CPU."""
        rows = self.prepared.train
        indices = rows_of_step(self.recipe.run.seed, step - 1, len(rows), self.plan.global_batch_size)
        for micro_batch in micro_batches_of(indices, self.plan, dist.get_rank()):
            yield collate([rows[i] for i in micro_batch], self.row_multiple)

    def _sum_over_ranks(self, *counts: int) -> list[int]:
        total = torch.tensor(counts).to(self.device)
        dist.all_reduce(total)
        return total.tolist()

    def _finite_total(self, losses: TaskLosses, step: int, batches: list[Batch]) -> TaskLosses:
        """The sums over all ranks; raises TrainingFault, on every rank, where a loss is not finite."""
        total = losses.over_ranks()
        if torch.isfinite(total.loss).all():
            return total
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        by_task = zip(self.prepared.tasks, losses.loss.tolist(), strict=True)
        dist.all_gather_object(found, [task for task, loss in by_task if not math.isfinite(loss)])
        where = "; ".join(f"rank {rank}: task {', '.join(tasks)}" for rank, tasks in enumerate(found) if tasks)
        layers = find_nonfinite_layers(self.engine, batches, backward=False)
        raise TrainingFault(
            f"step {step}: the loss is not finite ({where}); first layer: {layers or 'none, only the loss itself'}; "
            f"the weights are those of step {step - 1}"
        )

    def _apply_gradients(self, step: int, batches: list[Batch]) -> float:
        try:
            return apply_gradients(self.engine)
        except NonFiniteGradient:
            layers = find_nonfinite_layers(self.engine, batches, backward=True)
            raise TrainingFault(
                f"step {step}: the gradient is not finite while the loss is; first at the output of: "
                f"{layers or 'no layer, only in parameters'}; the weights are those of step {step - 1}; lower "
                "train.learning_rate, or set base.dtype: fp32"
            ) from None

    def _held_out_loss_if_due(self) -> TaskLosses | None:
        step, every = self.state.step, self.recipe.train.eval_every
        if not self.held_out_rows or not (step == self.total_steps or (every and step % every == 0)):
            return None
        with translate_peer_errors(f"held-out loss after step {step}"):
            found = self.held_out_loss()
        by_task = found.by_task(self.prepared.tasks)
        if bad := [task for task, loss in by_task.items() if not math.isfinite(loss)]:
            raise TrainingFault(
                f"step {step}: the held-out loss of {', '.join(bad)} is not finite, while that of training is"
            )
        return found

    def _out_of_patience(self) -> bool:
        patience = self.recipe.train.early_stopping_patience
        if patience is None or self.state.since_best < patience:
            return False
        if dist.get_rank() == 0:
            print(
                f"early stop      after step {self.state.step}: no held-out loss below that of step "
                f"{self.state.best_step}",
                flush=True,
            )
        return True

    def _save_is_due(self, held_out: TaskLosses | None) -> bool:
        config, step = self.recipe.checkpoint, self.state.step
        best = held_out is not None and self.state.add_held_out_loss(held_out.mean())
        return bool(config.save_every and step % config.save_every == 0) or (best and config.keep_best)

    def _save(self, checkpoints: CheckpointManager, log: RunLog, identity: dict[str, Any]) -> None:
        step = self.state.step
        facts = {**identity, **self.state_facts(), "metrics_bytes": log.position()}  # by which 0.1.0 resumes
        with translate_peer_errors(f"checkpoint of step {step}"):
            checkpoints.save(step, facts, self.state.best_step)
        self.state.saved_step = step

    def _stop(self, checkpoints: CheckpointManager, log: RunLog, identity: dict[str, Any]) -> None:
        """Saves the state and raises Stopped, on every rank after the same step."""
        step = self.state.step
        if step > self.state.saved_step:
            self._save(checkpoints, log, identity)
        with translate_peer_errors("the checkpoint that was asked for"):
            problem = checkpoints.saver.finish()
        if problem:
            raise TrainingFault(f"asked to stop after step {step}, which could not be saved: {problem}")
        where = f"saved in {checkpoints.folder}" if step else "nothing was trained yet"
        raise Stopped(
            f"stopped after step {step} of {self.total_steps} as a signal asked; {where}; start again to go on"
        )
