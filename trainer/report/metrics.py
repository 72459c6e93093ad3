"""What a run leaves to be read: metrics.jsonl, a line each optimizer step, and the same numbers in TensorBoard."""

import contextlib
import json
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.loop import StepReport
from trainer.loss import TaskLosses

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def step_record(report: StepReport, tasks: Sequence[str], held_out: TaskLosses | None) -> dict[str, Any]:
    """One line of metrics.jsonl: losses in nats a labelled token, times in seconds, memory in bytes."""
    record = {
        "step": report.step,
        "loss": report.losses.mean(),
        "loss_by_task": report.losses.by_task(tasks),
        "learning_rate": report.learning_rate,
        "grad_norm": report.grad_norm,
        "labelled_tokens": report.labelled_tokens,
        "tokens": report.tokens,
        "step_seconds": report.seconds,
        "tokens_per_second": report.tokens / report.seconds,
        "labelled_tokens_per_second": report.labelled_tokens / report.seconds,
        "peak_memory_bytes": peak_memory(),
    }
    if report.router is not None:
        record["router_weight"] = report.router.weights.mean(0).tolist()
        record["router_entropy"] = report.router.entropy.mean().item()
        record["router_balance"] = report.router.balance
    if held_out is not None:
        record["held_out_loss"] = held_out.mean()
        record["held_out_loss_by_task"] = held_out.by_task(tasks)
    return record


def peak_memory() -> int:
    """Most bytes this rank has held so far: on its GPU where it has one, else resident in the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MetricsWriter:
    """Writes records as they come, so that a run that dies leaves all its finished steps.

    step: those that are done, where the run goes on; keep: bytes of metrics.jsonl that tell of them. What is there
    beyond is cut off, and TensorBoard told to forget it.
    """

    def __init__(self, directory: Path, tensorboard: bool, step: int = 0, keep: int = 0) -> None:
        self._file = (directory / METRICS).open("ab")
        self._file.truncate(min(keep, self._file.tell()))
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / TENSORBOARD), flush_secs=10, purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """A full disk ends no training: the lines wait in memory for room, and TensorBoard's are given up."""
        with self._loudly(METRICS):
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        with self._loudly(TENSORBOARD):
            for tag, value in scalars(record) if self._board is not None else ():
                self._board.add_scalar(tag, value, record["step"])

    def position(self) -> int:
        """Bytes of metrics.jsonl so far; all that was written is handed to the system, TensorBoard's events too."""
        with self._loudly(TENSORBOARD):
            if self._board is not None:
                self._board.flush()
        return self._file.tell()

    def close(self) -> None:
        with self._loudly(METRICS):
            self._file.close()
        with self._loudly(TENSORBOARD):
            if self._board is not None:
                self._board.close()

    @contextlib.contextmanager
    def _loudly(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            print(
                f"warning: {what} cannot be written ({error.strerror}); training goes on", file=sys.stderr, flush=True
            )
            if what == TENSORBOARD:
                self._board = None


def scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    """A record's numbers under TensorBoard tags: a group each for training, held-out rows, speed and routers."""
    groups = {
        "train": ("loss", "loss_by_task", "learning_rate", "grad_norm"),
        "held_out": ("held_out_loss", "held_out_loss_by_task"),
        "speed": ("step_seconds", "tokens_per_second", "labelled_tokens_per_second", "peak_memory_bytes"),
        "router": ("router_weight", "router_entropy", "router_balance"),
    }
    found = []
    for group, keys in groups.items():
        for key in keys:
            name, value = f"{group}/{key.removeprefix(group + '_')}", record.get(key)
            if isinstance(value, dict):
                found += [(f"{name}/{task}", number) for task, number in value.items()]
            elif isinstance(value, list):
                found += [(f"{name}/expert_{index}", number) for index, number in enumerate(value)]
            elif value is not None:
                found.append((name, value))
    return found
