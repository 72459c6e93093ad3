"""The numbers of a run: metrics.jsonl, one line per optimizer step, and the same in TensorBoard."""

import contextlib
import io
import json
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.publish import unused_path, write_atomically
from trainer.objective.loss import TaskLosses
from trainer.telemetry.router_numbers import router_record
from trainer.telemetry.step_report import StepReport

METRICS = "metrics.jsonl"
LATER = ".metrics-later.jsonl"
EARLIER = "metrics-earlier.jsonl"
TENSORBOARD = "tensorboard"


def step_record(report: StepReport, tasks: Sequence[str], held_out: TaskLosses | None) -> dict[str, Any]:
    """One line of metrics.jsonl: losses in nats per labelled token, times in seconds, memory in bytes."""
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
        **peak_memory(),
    }
    if report.router is not None:
        record |= router_record(report.router, tasks)
    if held_out is not None:
        record["held_out_loss"] = held_out.mean()
        record["held_out_loss_by_task"] = held_out.by_task(tasks)
    return record


def peak_memory() -> dict[str, int]:
    """Peak bytes of this rank so far: allocated on its GPU, else resident in the process.

    On a GPU also what torch's allocator has reserved there: far more than was allocated means fragmented memory.
    """
    if torch.cuda.is_available():
        used, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_memory_bytes": used, "peak_reserved_bytes": reserved}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl; without it none, and without lines that were damaged since."""
    try:
        return [record for _, record in _records_by_line((directory / METRICS).read_bytes())]
    except OSError:
        return []


def _records_by_line(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line, and the record of a step that it holds; other lines are left out."""
    for line in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record


def _lines_by_step(content: bytes) -> dict[int, bytes]:
    return {record["step"]: line + b"\n" for line, record in _records_by_line(content)}


def _end_of_steps(content: bytes, step: int) -> int:
    """Where the last whole line of the steps up to `step` ends. Half a line is what a full disk may have left."""
    end = position = 0
    for line in io.BytesIO(content[: content.rfind(b"\n") + 1]):
        position += len(line)
        for _, record in _records_by_line(line):
            if record["step"] > step:
                return end
            end = position
    return end


class MetricsWriter:
    """Writes each record at once, so that a run that dies leaves all its finished steps.

    step: steps that are done, where the run resumes; lines of later ones are cut off, and purged from TensorBoard. own:
    whether metrics.jsonl is of these steps; a file of others is renamed, not emptied.
    passed_over: whether a checkpoint of a later step could not be read. The next start may be able to, and go on from
    there: lines of later steps are then kept in LATER, where it finds them. before_write: is called before each write.
    """

    def __init__(
        self,
        directory: Path,
        tensorboard: bool,
        step: int = 0,
        own: bool = False,
        before_write: Callable[[], None] = lambda: None,
        passed_over: bool = False,
    ) -> None:
        self._before_write = before_write
        before_write()
        path = directory / METRICS
        content = path.read_bytes() if path.is_file() else b""
        if not own:
            _set_aside(path, content)
        path.touch()
        _cut(path, content, step if own else 0, passed_over)
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()  # lines, or their rest, for which there was no room
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            _silence_writer_thread()
            self._board = SummaryWriter(str(directory / TENSORBOARD), flush_secs=10, purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """A full disk does not end training: lines wait in memory for room, and TensorBoard is given up."""
        self._waiting += json.dumps(record).encode() + b"\n"
        self._flush_waiting()
        with self._warn_on_failure(TENSORBOARD):
            if self._board is not None:
                for tag, value in scalars(record):
                    self._board.add_scalar(tag, value, record["step"])

    def show(self, pictures: dict[str, np.ndarray], step: int) -> None:
        """Pictures for TensorBoard by tag: uint8 [height, width, 3]."""
        with self._warn_on_failure(TENSORBOARD):
            if self._board is not None:
                for tag, picture in pictures.items():
                    self._board.add_image(tag, picture, step, dataformats="HWC")

    def position(self) -> int:
        """Bytes of metrics.jsonl so far, those that wait included. Flushes TensorBoard's events too."""
        with self._warn_on_failure(TENSORBOARD):
            if self._board is not None:
                self._board.flush()
        return self._file.tell() + len(self._waiting)

    def close(self) -> None:
        self._flush_waiting()
        with self._warn_on_failure(METRICS):
            self._file.close()
        with self._warn_on_failure(TENSORBOARD):
            if self._board is not None:
                self._board.close()

    def _flush_waiting(self) -> None:
        with self._warn_on_failure(METRICS):
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]

    @contextlib.contextmanager
    def _warn_on_failure(self, what: str) -> Iterator[None]:
        self._before_write()
        try:
            yield
        except OSError as error:
            print(
                f"warning: {what} cannot be written ({error.strerror}); training goes on", file=sys.stderr, flush=True
            )
            if what == TENSORBOARD:
                self._board = None


def _silence_writer_thread() -> None:
    """TensorBoard writes in a thread: what it raises there, the next call here raises again."""
    before = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        its_own = type(raised.thread).__module__.startswith("tensorboard.")
        if not (its_own and isinstance(raised.exc_value, OSError)):
            before(raised)

    threading.excepthook = hook


def _set_aside(path: Path, content: bytes) -> None:
    """Keeps the file of earlier starts, which has this content, under another name, and says so, if it has any step."""
    steps = content.count(b"\n")
    if steps:
        kept = path.rename(unused_path(path.with_name(EARLIER)))
        print(f"metrics         {path.name} of an earlier start ({steps} steps) is kept as {kept.name}", flush=True)


def _cut(path: Path, content: bytes, step: int, passed_over: bool) -> None:
    """Cuts the file, which had this content, to the lines of the first `step` steps.

    Lines that an earlier start has kept in LATER are put back. Warns where these are not the lines of so many steps.
    """
    whole = _end_of_steps(content, step)
    lines = content.count(b"\n", 0, whole)
    with path.open("rb+") as file:
        file.truncate(whole)
    beside = path.with_name(LATER)
    restored = 0
    with contextlib.suppress(OSError):  # a full disk does not end training
        later = _lines_by_step(beside.read_bytes()) if beside.is_file() else {}
        missing = [later[n] for n in range(lines + 1, step + 1) if n in later]
        if missing:
            write_atomically(path, content[:whole] + b"".join(missing))
            restored = len(missing)
        if passed_over:
            write_atomically(beside, b"".join({**later, **_lines_by_step(content[whole:])}.values()))
        else:
            beside.unlink(missing_ok=True)
    if lines + restored != step:
        print(
            f"warning: {path} was changed since the checkpoint at step {step}: {lines + restored} of its lines are "
            "kept, and training goes on",
            file=sys.stderr,
            flush=True,
        )


def scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    """A record's numbers by TensorBoard tag, in groups for training, held-out rows, speed and routers."""
    groups = {
        "train": ("loss", "loss_by_task", "learning_rate", "grad_norm"),
        "held_out": ("held_out_loss", "held_out_loss_by_task"),
        "speed": (
            "step_seconds",
            "tokens_per_second",
            "labelled_tokens_per_second",
            "peak_memory_bytes",
            "peak_reserved_bytes",
        ),
        "router": (
            "router_weight",
            "router_omega",
            "router_entropy",
            "router_entropy_share",
            "router_entropy_by_task",
            "router_balance",
            "router_task_distance",
            "router_interaction_distance",
            "router_interaction_off_diagonal",
        ),
        "router_by_task": ("router_weight_by_task",),
        "router_by_layer": ("router_weight_by_layer",),
    }
    return [
        number
        for group, keys in groups.items()
        for key in keys
        if key in record
        for number in _flat(f"{group}/{key.removeprefix('router_').removeprefix(group + '_')}", record[key])
    ]


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}/{key}", inner)
    elif isinstance(value, list):
        for index, number in enumerate(value):
            yield f"{name}/expert_{index}", number
    else:
        yield name, value
