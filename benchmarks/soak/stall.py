"""How long training stands still for a save: the state of an adapter of 100 M parameters, on two ZeRO-3 ranks.

    python -m benchmarks.soak.stall

Prints the seconds that training waits for a save, those that the save takes, and their ratio as a JSON object.
"""

import json
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.placement.rank import Shape, Variant, engine_of
from benchmarks.shared.processor import processor
from tests.support.ranks import run_ranks
from trainer.checkpoint.async_saver import AsyncSaver
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.trained_state import TrainedState
from trainer.console.library_logs import silence_libraries
from trainer.distributed.process_group import process_group
from trainer.recipe import CheckpointConfig

LARGE = Shape(1024, 2816, 4, ("gate_proj", "up_proj", "down_proj"), expert_rank=544)  # 100 M parameters
WORLD, REPETITIONS = 2, 5


def measure(folder: Path) -> dict[str, Any]:
    """On every rank."""
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


def rank(folder: str, output: str) -> None:
    silence_libraries()
    with process_group():
        found = measure(Path(folder))
        if dist.get_rank() == 0:
            Path(output).write_text(json.dumps(found))
        dist.barrier()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "stall.json"
        run_ranks(WORLD, ["-m", "benchmarks.soak.stall", str(Path(name) / "checkpoints"), str(output)])
        timed = json.loads(output.read_text())
    waits, saves = timed["stall"], timed["blocking"]
    print(f"saves of {timed['parameters'] / 1e6:.0f} M parameters, seconds: training waits ", end="")
    print(f"{statistics.median(waits):.2f} (the first time {waits[0]:.2f}) of {statistics.median(saves):.2f}")
    numbers = {
        "stall_over_blocking": round(statistics.median(waits) / statistics.median(saves), 3),
        "first_stall_over_blocking": round(waits[0] / saves[0], 3),
        "processor": processor(),
    }
    print(json.dumps(numbers))


if __name__ == "__main__":
    rank(*sys.argv[1:]) if sys.argv[1:] else main()
