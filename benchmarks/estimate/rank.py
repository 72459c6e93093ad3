"""One rank of `python -m benchmarks.estimate`: builds the engine as training does, makes two steps, measures itself.

The second step is the first in which ZeRO-3 prefetches: it needs the trace of a whole one.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.shared.process_memory import PeakWatch, anonymous_bytes, settled_bytes
from data_prep.reader import PreparedSet
from trainer.base.weight_map import open_base
from trainer.console.library_logs import silence_libraries
from trainer.distributed.deepspeed_config import read_deepspeed_config
from trainer.distributed.parallelize import parallelize
from trainer.distributed.process_group import process_group
from trainer.objective.batches import plan_batches
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe
from trainer.training.trainer import Trainer

STEPS = 2


def build(recipe: Recipe, device: torch.device) -> Trainer:
    plan = plan_batches(recipe.train.global_batch_size, recipe.train.micro_batch_size, dist.get_world_size())
    config = read_deepspeed_config(recipe, plan)
    parallel = parallelize(recipe, open_base(recipe.base), config, device, num_tasks=1, steps=STEPS)
    rows = labelled_rows(plan.global_batch_size, recipe.data.seq_len)
    prepared = PreparedSet(Path("unused"), {"tasks": ["text"]}, rows, [], [])
    trainer = Trainer(recipe, parallel, prepared, plan, device, STEPS)
    trainer.router_every = 1
    return trainer


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
        trainer = build(recipe, device)
        loading = watch.peak()
        watch = PeakWatch()
        for _ in range(STEPS):
            trainer.train_step()
        peak = watch.peak()
        found = {"loading": loading - before, "resident": settled_bytes() - before, "peak": peak - before}
        everyone: list[dict[str, int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
    return {name: max(rank[name] for rank in everyone) for name in found}


if __name__ == "__main__":
    silence_libraries()
    import deepspeed  # noqa: F401 (imports are not measured)

    print(json.dumps(measure(load_recipe(Path(sys.argv[1])))))
