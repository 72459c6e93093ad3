"""The steps of a run in their order: train, look at held-out rows, report, save, and end when asked to."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer.checkpoint.manager import CheckpointManager
from trainer.distributed.process_group import translate_peer_errors
from trainer.errors import Stopped, TrainingFault
from trainer.objective.loss import TaskLosses
from trainer.recipe import Recipe
from trainer.run.stop_signal import StopSignal
from trainer.telemetry.metrics import MetricsWriter, step_record
from trainer.telemetry.progress import StepProgress
from trainer.telemetry.router_images import RouterImages
from trainer.telemetry.startup import StartupTimer
from trainer.training.loop import Parts, StepReport, held_out_losses, run_step
from trainer.training.resume import ResumePoint

LAST_WORDS = 10.0  # seconds for a save under way when an error ends the run


@dataclass
class HeldOutHistory:
    """The best held-out loss so far, its step, and how many have come after it."""

    best_loss: float | None = None
    best_step: int | None = None
    since: int = 0

    def see(self, step: int, loss: float) -> bool:
        """Whether this one is the best."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.since = loss, step, 0
            return True
        self.since += 1
        return False


@dataclass
class Course:
    """One run on one rank, from where it begins to its last step. fixed: facts that every checkpoint repeats."""

    recipe: Recipe
    parts: Parts
    steps: int
    resume_point: ResumePoint
    checkpoints: CheckpointManager
    stop: StopSignal
    fixed: dict[str, Any]

    def __post_init__(self) -> None:
        self.first = dist.get_rank() == 0
        self.history = self._history()
        self.done = self.saved = self.resume_point.step  # steps that are made, and that a checkpoint holds
        self.writer: MetricsWriter | None = None
        self.pictures: RouterImages | None = None

    def _history(self) -> HeldOutHistory:
        """That of the checkpoint; a new one where losses are of other rows now."""
        facts = self.resume_point.facts
        if facts and facts["recipe"]["train"]["eval_rows"] != self.recipe.train.eval_rows:
            return HeldOutHistory()
        return HeldOutHistory(**facts.get("held_out", {}))

    def run(self, clock: StartupTimer) -> None:
        """Raises TrainingFault, and Stopped when a signal asked for it and the state is saved; on every rank."""
        begun = self.resume_point.step
        with self._reporting() as progress:
            for step in range(begun + 1, self.steps + 1):
                if self._out_of_patience():
                    break
                self._end_if_asked()
                with translate_peer_errors(f"step {step}"):
                    report = run_step(self.parts, step)
                if step == begun + 1:
                    clock.lap("first step")
                    if self.first:
                        print(clock, flush=True)
                held_out = self._held_out(step)
                if self.writer is not None:
                    record = step_record(report, self.parts.prepared.tasks, held_out)
                    self.writer.write(record)
                    self._draw(report)
                    progress.show(record)
                self._save_if_due(step, held_out)
                self.done = step
            with translate_peer_errors("the last checkpoint"):
                self.checkpoints.saver.finish()
            if self.pictures is not None:
                self.writer.show(self.pictures.draw(), self.done)

    @contextmanager
    def _reporting(self) -> Iterator[StepProgress]:
        begun, keep = self.resume_point.step, self.resume_point.metrics_bytes(self.recipe.run.directory)
        progress = StepProgress(self.steps, enabled=self.first, done=begun)
        if self.first:
            self.writer = MetricsWriter(self.recipe.run.directory, self.recipe.report.tensorboard, begun, keep)
            if self.recipe.report.tensorboard:
                self.pictures = RouterImages(self.parts.prepared.tasks)
        try:
            yield progress
        except Stopped:
            raise
        except BaseException:
            self.checkpoints.saver.abandon(LAST_WORDS)
            raise
        finally:
            progress.close()
            if self.writer is not None:
                self.writer.close()

    def _draw(self, report: StepReport) -> None:
        """The routers' pictures, where there is time for them."""
        if self.pictures is None:
            return
        if report.router is not None:
            self.pictures.see(report.router)
        if self.pictures.due():
            self.writer.show(self.pictures.draw(), report.step)

    def _held_out(self, step: int) -> TaskLosses | None:
        every = self.recipe.train.eval_every
        if not self.parts.held_out_rows or not (step == self.steps or (every and step % every == 0)):
            return None
        with translate_peer_errors(f"held-out loss after step {step}"):
            found = held_out_losses(self.parts)
        by_task = found.by_task(self.parts.prepared.tasks)
        if bad := [task for task, loss in by_task.items() if not math.isfinite(loss)]:
            raise TrainingFault(
                f"step {step}: the held-out loss of {', '.join(bad)} is not finite, that of training is"
            )
        return found

    def _out_of_patience(self) -> bool:
        patience = self.recipe.train.early_stopping_patience
        if patience is None or self.history.since < patience:
            return False
        if self.first:
            best_step = self.history.best_step
            print(
                f"early stop      after step {self.done}: no held-out loss below that of step {best_step}", flush=True
            )
        return True

    def _save_if_due(self, step: int, held_out: TaskLosses | None) -> None:
        config = self.recipe.checkpoint
        best = held_out is not None and self.history.see(step, held_out.mean())
        if (config.save_every and step % config.save_every == 0) or (best and config.keep_best):
            self._save(step)

    def _save(self, step: int) -> None:
        engine, router_stats = self.parts.engine, self.parts.router_stats
        facts = {
            **self.fixed,
            "step": step,
            "metrics_bytes": self.writer.position() if self.writer is not None else 0,
            "scheduler": engine.lr_scheduler.state_dict(),
            "router_means": router_stats.means.tolist(),
            "held_out": asdict(self.history),
        }
        with translate_peer_errors(f"checkpoint of step {step}"):
            self.checkpoints.save(step, facts, self.history.best_step)
        self.saved = step

    def _end_if_asked(self) -> None:
        """Every rank takes part in one small all-reduce: a signal at any of them ends all, after the same step."""
        asked = torch.tensor(self.stop.name is not None, dtype=torch.int32, device=self.parts.device)
        with translate_peer_errors(f"after step {self.done}"):
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if not asked.item():
            return
        if self.done > self.saved:
            self._save(self.done)
        with translate_peer_errors("the checkpoint that was asked for"):
            problem = self.checkpoints.saver.finish()
        if problem:
            raise TrainingFault(f"asked to stop after step {self.done}, which could not be saved: {problem}")
        where = f"saved in {self.checkpoints.folder}" if self.done else "nothing was trained yet"
        raise Stopped(
            f"stopped after step {self.done} of {self.steps} as a signal asked; {where}; start again to go on"
        )
