"""One rank of `python -m benchmarks.estimate`: builds the engine as training does, makes two steps, measures itself.

The second step is the first in which ZeRO-3 prefetches: it needs the trace of a whole one.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from benchmarks.shared.process_memory import PeakWatch, anonymous_bytes, settled_bytes
from data_prep.reader import PreparedSet
from tests.support.training import build_training
from trainer.console.library_logs import silence_libraries
from trainer.distributed.process_group import process_group
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe

STEPS = 2


def labelled_rows(count: int, length: int) -> list[dict[str, np.ndarray]]:
    """Full rows of one document each, every token labelled, as the estimate takes them to be."""
    places = np.arange(length)
    row = {"input_ids": places, "labels": places, "position_ids": places, "task_ids": np.zeros(length, dtype=np.int64)}
    return [row] * count


def measure(recipe: Recipe) -> dict[str, int]:
    """Bytes above those after imports."""
    before = anonymous_bytes()
    watch = PeakWatch()
    with process_group() as device:
        rows = labelled_rows(recipe.train.global_batch_size, recipe.data.seq_len)
        training = build_training(recipe, device, PreparedSet(Path("unused"), {"tasks": ["text"]}, rows, [], []))
        loading = watch.peak()
        watch = PeakWatch()
        for step in range(1, STEPS + 1):
            training.step(step)
        peak = watch.peak()
        found = {"loading": loading - before, "resident": settled_bytes() - before, "peak": peak - before}
        everyone: list[dict[str, int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
    return {name: max(rank[name] for rank in everyone) for name in found}


if __name__ == "__main__":
    silence_libraries()
    import deepspeed  # noqa: F401 (imports are not measured)

    print(json.dumps(measure(load_recipe(Path(sys.argv[1])))))
