"""One rank of `python -m benchmarks.faults`: saves the state of a large adapter under ZeRO-3, and times it."""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.placement.rank import Shape, Variant, engine_of
from trainer.checkpoint.async_saver import AsyncSaver
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.trained_state import TrainedState
from trainer.console.library_logs import silence_libraries
from trainer.distributed.process_group import process_group
from trainer.recipe import CheckpointConfig

LARGE = Shape(1024, 2816, 4, ("gate_proj", "up_proj", "down_proj"), expert_rank=544)  # 100 M parameters
REPETITIONS = 5


def measure(folder: Path) -> dict[str, Any]:
    engine = engine_of(Variant(), LARGE)
    state = TrainedState(engine, engine.module.model)
    saver = AsyncSaver(state, timedelta(seconds=300))
    checkpoints = CheckpointManager(saver, folder, CheckpointConfig(keep_last=1))
    waits, saves = [], []
    for step in range(1, REPETITIONS + 1):
        dist.barrier()
        begun = time.perf_counter()
        checkpoints.save(step, {}, best=None)
        dist.barrier()
        waits.append(time.perf_counter() - begun)
        problem = saver.finish()
        saves.append(time.perf_counter() - begun)
        if problem is not None:
            raise RuntimeError(problem)
    parameters = sum(key.numel for key in state.keys if key.kind == "parameter")
    return {"stall": waits, "blocking": saves, "parameters": parameters}


def main(folder: str, output: str) -> None:
    silence_libraries()
    with process_group():
        found = measure(Path(folder))
        if dist.get_rank() == 0:
            Path(output).write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
