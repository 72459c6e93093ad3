"""One rank of `python -m benchmarks.telemetry`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from datasets import load_from_disk

from benchmarks.step.ours import recipe_of
from benchmarks.step.setting import Setting
from data_prep.reader import PreparedSet
from tests.support.training import Training, build_training
from trainer.console.library_logs import silence_libraries
from trainer.distributed.process_group import process_group
from trainer.recipe import ReportConfig
from trainer.telemetry.metrics import MetricsWriter, step_record
from trainer.telemetry.router_images import SHARE, RouterImages
from trainer.telemetry.step_report import StepReport

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS = 6
NEVER = 1_000_000
WARM_UP = 2
DRAWINGS = 3
NAMES = [f"task {index}" for index in range(TASKS)]


class Rows:
    """The rows, each cut into documents of TASKS tasks by task id alone."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self._rows[index]
        return {**row, "task_ids": np.arange(len(row["input_ids"])) * TASKS // len(row["input_ids"])}


def main(base: str, rows: str, steps: int, folder: Path) -> None:
    silence_libraries()
    with process_group() as device:
        setting = Setting(steps=WARM_UP + steps)
        recipe = recipe_of(base, setting, dist.get_world_size())
        recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"target_modules": TARGETS})})
        data = Rows(load_from_disk(rows).with_format("numpy"))
        prepared = PreparedSet(Path(rows), {"tasks": NAMES}, data, [], [])
        training = build_training(recipe, device, prepared)
        writer = MetricsWriter(folder, tensorboard=True) if dist.get_rank() == 0 else None
        found, last = timed(training, steps, writer)
        if writer is not None:
            found |= {"interval": ReportConfig().router_every, "share": SHARE, "drawings": drawn(last, writer)}
            (folder / "found.json").write_text(json.dumps(found))
        dist.barrier()


def timed(training: Training, steps: int, writer: MetricsWriter | None) -> tuple[dict[str, list[float]], StepReport]:
    """Seconds of plain and measured steps, writing included, which take turns at being first; the last measured."""
    seconds: dict[str, list[float]] = {"plain": [], "measured": []}
    every = {"plain": NEVER, "measured": 1}
    for step in range(1, WARM_UP + 1):
        last = training.step(step)
    for pair in range(steps // 2):
        for place, kind in enumerate(("plain", "measured") if pair % 2 == 0 else ("measured", "plain")):
            training.measure_routers_every(every[kind])
            dist.barrier()
            started = time.perf_counter()
            report = training.step(WARM_UP + 2 * pair + place + 1)
            if writer is not None:
                writer.write(step_record(report, NAMES, None))
            dist.barrier()
            seconds[kind].append(time.perf_counter() - started)
            last = report if kind == "measured" else last
    return seconds, last


def drawn(report: StepReport, writer: MetricsWriter) -> list[float]:
    """Seconds of each drawing, the import of matplotlib in the first."""
    pictures, seconds = RouterImages(NAMES), []
    for _ in range(DRAWINGS):
        pictures.add(report.router)
        started = time.perf_counter()
        writer.show(pictures.draw(), report.step)
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
