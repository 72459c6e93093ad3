"""One timed run of our loop with TeamLoRA, one rank of it: our side of `python -m benchmarks.step`."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset, load_from_disk

from benchmarks.step.setting import TARGETS, Setting
from data_prep.reader import PreparedSet
from tests.support.training import Training, build_training
from trainer.console.library_logs import silence_libraries
from trainer.distributed.process_group import process_group
from trainer.objective.batches import rows_of_step
from trainer.recipe import Recipe
from trainer.telemetry.metrics import peak_memory

EXPERTS = 4


def recipe_of(base: str, setting: Setting, world: int) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"name": "benchmark"},
            "base": {"model": base, "quantization": "nf4", "dtype": "bf16"},
            "adapter": {
                "num_experts": EXPERTS,
                "total_rank": setting.total_rank,
                "alpha": setting.total_rank // EXPERTS,
                "target_modules": TARGETS,
            },
            "data": {
                "prepared_dir": "unused",
                "seq_len": setting.seq_len,
                "sources": [{"type": "files", "task": "text", "path": "unused"}],
            },
            "train": {
                "steps": setting.steps,
                "global_batch_size": setting.micro_batch_size * world,
                "micro_batch_size": setting.micro_batch_size,
                "learning_rate": 2e-4,
                "lr_scheduler": "constant",
                "activation_checkpointing": setting.checkpointing,
            },
            "deepspeed": {"config": "zero3" if setting.sharded else "single"},
        }
    )


def in_order_of_steps(rows: Dataset, seed: int) -> Dataset:
    """The rows so placed that our seeded order meets them one after the other, as TRL's sequential sampler does."""
    return rows.select(np.argsort(rows_of_step(seed, 0, len(rows), len(rows))))


def main(base: str, rows: str, setting: Setting, output: Path) -> None:
    silence_libraries()
    with process_group() as device:
        started = time.perf_counter()
        training = build(base, rows, setting, device)
        load_seconds = time.perf_counter() - started
        reports = [training.step(step) for step in range(1, setting.steps + 1)]
        if dist.get_rank() == 0:
            found = {"seconds": [r.seconds for r in reports], "losses": [r.losses.mean() for r in reports]}
            output.write_text(json.dumps({**found, "load_seconds": load_seconds, **peak_memory()}))
        dist.barrier()


def build(base: str, rows: str, setting: Setting, device: torch.device) -> Training:
    recipe = recipe_of(base, setting, dist.get_world_size())
    train = in_order_of_steps(load_from_disk(rows), recipe.run.seed).with_format("numpy")
    prepared = PreparedSet(Path(rows), {"tasks": ["text"]}, train, [], [])
    return build_training(recipe, device, prepared, setting.persistence_threshold if setting.sharded else None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Setting(**json.loads(sys.argv[3])), Path(sys.argv[4]))
