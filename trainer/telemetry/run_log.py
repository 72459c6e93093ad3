"""What a run shows and writes while it trains: progress, metrics.jsonl, TensorBoard, pictures of the routers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from trainer.objective.loss import TaskLosses
from trainer.telemetry.metrics import MetricsWriter, step_record
from trainer.telemetry.progress import StepProgress
from trainer.telemetry.router_images import RouterImages
from trainer.telemetry.step_report import StepReport


class RunLog:
    """The log of one run on rank 0; on other ranks (`enabled=False`) every method does nothing.

    done: steps of earlier starts of the run, after which it resumes. before_write: is called before each write into the
    directory. own, passed_over: as for MetricsWriter.
    """

    def __init__(
        self,
        directory: Path,
        tasks: Sequence[str],
        total_steps: int,
        tensorboard: bool,
        enabled: bool,
        done: int = 0,
        own: bool = False,
        before_write: Callable[[], None] = lambda: None,
        passed_over: bool = False,
    ) -> None:
        self._tasks = tasks
        self._progress = StepProgress(total_steps, enabled=enabled, done=done)
        self._writer = None
        if enabled:
            self._writer = MetricsWriter(directory, tensorboard, done, own, before_write, passed_over)
        self._images = RouterImages(tasks) if enabled and tensorboard else None
        self._last_step = done

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def log_step(self, report: StepReport, held_out: TaskLosses | None) -> None:
        """Writes and shows one step; draws the routers where there is time for it."""
        self._last_step = report.step
        if self._writer is None:
            return
        record = step_record(report, self._tasks, held_out)
        self._writer.write(record)
        if self._images is not None:
            if report.router is not None:
                self._images.add(report.router)
            if self._images.due():
                self._writer.show(self._images.draw(), report.step)
        self._progress.show(record)

    def log_last_images(self) -> None:
        """Draws the routers as they were measured since the last drawing."""
        if self._writer is not None and self._images is not None:
            self._writer.show(self._images.draw(), self._last_step)

    def position(self) -> int:
        """Bytes of metrics.jsonl so far; 0 on other ranks than the first."""
        return self._writer.position() if self._writer is not None else 0
