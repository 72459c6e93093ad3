"""Progress of loading and training: a bar on a terminal, otherwise a plain line every ten seconds."""

import time
from typing import Any

from pydantic import ByteSize
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY = 10.0  # seconds between plain lines


class LoadProgress:
    """Shows how many bytes of the base have been read; `enabled=False` (ranks other than 0) shows nothing."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._total = total
        self._enabled = enabled
        self._started = self._last_line = time.perf_counter()
        self._bar: Progress | None = None
        if enabled and (console := Console()).is_terminal:
            columns = (TextColumn("base"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("load", total=total)
            self._bar.start()

    def __call__(self, done: int) -> None:
        """done: bytes read so far."""
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif self._enabled and now - self._last_line >= LINE_EVERY:
            self._last_line = now
            left = (now - self._started) * (self._total - done) / done
            read, total = (ByteSize(size).human_readable(separator=" ") for size in (done, self._total))
            print(f"base: {read} of {total} read, {left:.0f} s left", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class StepProgress:
    """Shows the steps of a run; `enabled=False` (ranks other than 0) shows nothing. done: steps of earlier starts."""

    def __init__(self, steps: int, enabled: bool, done: int = 0) -> None:
        self._steps, self._done = steps, done
        self._enabled = enabled
        self._last_line = 0.0
        self._started = time.perf_counter()
        self._bar: Progress | None = None
        if enabled and (console := Console()).is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[now]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("train", total=steps, completed=done, now="")
            self._bar.start()

    def show(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl that has just been written."""
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], now=_now(record))
        elif self._enabled:
            self._line(record)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, record: dict[str, Any]) -> None:
        now, step = time.perf_counter(), record["step"]
        notable = step in (self._done + 1, self._steps) or "held_out_loss" in record
        if notable or now - self._last_line >= LINE_EVERY:
            self._last_line = now
            left = (now - self._started) / (step - self._done) * (self._steps - step)
            print(f"step {step}/{self._steps}  {_now(record)}  {left:.0f} s left", flush=True)


def _now(record: dict[str, Any]) -> str:
    text = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  {record['tokens_per_second']:.0f} tokens/s"
    if "held_out_loss" in record:
        text += f"  held-out {record['held_out_loss']:.4f}"
    return text
