"""One rank of the tests of resuming: saves in the middle of unbroken runs, or goes on from what others have saved.

python -m tests.distributed.resume_worker save|go_on BASE FOLDER      (with RANK, WORLD_SIZE, ... set)
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.worker import keep
from tests.support import scene
from tests.support.tiny_training import build
from tests.support.training import Training
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.storage import folder_name
from trainer.console.library_logs import silence_libraries
from trainer.distributed.engine import gather_trainable
from trainer.distributed.process_group import process_group
from trainer.recipe import CheckpointConfig, Recipe
from trainer.training.resume import find_newest_checkpoint, restore

WORLDS = (1, 2, 4)
BATCH, SAVED_AT, STEPS = 8, 4, 14
# name: changes of the recipe, by number of ranks
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"zero0": {"stage": 0}, "zero2": {"stage": 2}, "zero3": {"train__micro_batch_size": 4}},
    2: {
        "zero0": {"stage": 0},
        "zero2": {"stage": 2, "train__micro_batch_size": 2},
        "zero3": {},
        "offload": {"deepspeed__config": "ds_configs/zero3_offload.json", "adapter__shard_group": 1},
        "experts2": {"experts__parallel_size": 2, "experts__dispatch": "weights"},
        "eight_bits": {"train__optimizer": "adamw_8bit"},
    },
    4: {
        "zero2": {"stage": 2},
        "zero3": {"train__micro_batch_size": 2},
        "experts2": {
            "experts__parallel_size": 2, "experts__dispatch": "weights",
            "base__shard_group": 2, "adapter__shard_group": 2,
        },
        "experts2_replicated": {
            "experts__parallel_size": 2, "experts__dispatch": "weights", "experts__replicate": True,
        },
        "experts4": {"experts__parallel_size": 4, "experts__dispatch": "tokens"},
    },
}  # fmt: skip
# saved in the first layout, gone on with in the others
ROUTES = {
    "1-zero0": ("1-zero3", "2-experts2", "4-zero3"),
    "2-zero2": ("1-zero0", "2-zero3", "4-experts4"),
    "2-experts2": ("1-zero2", "2-zero0", "4-experts2"),
    "4-zero3": ("1-zero0", "2-offload", "4-zero2"),
    "4-experts2_replicated": ("1-zero3", "2-zero2", "4-experts4"),
    "4-experts4": ("1-zero0", "2-experts2", "4-experts2_replicated"),
}
BF16_WORLDS = (1, 2)


def recipe_of(base: Path, layout: dict[str, Any], **changes: Any) -> Recipe:
    return scene.recipe(
        base, train__global_batch_size=BATCH, train__steps=STEPS, train__lr_scheduler="cosine", **(layout | changes)
    )


def rows() -> list:
    return scene.rows(3 * BATCH, seed=5)


def save(base: Path, folder: Path, device: torch.device) -> None:
    """Unbroken runs; each saves on its way, and after its last step goes back to what it saved."""
    world = dist.get_world_size()
    for name, layout in LAYOUTS[world].items():
        for dtype in dtypes(world):
            training = build(recipe_of(base, layout, base__dtype=dtype), device, rows())
            saver = training.saver()
            target = folder / f"{world}-{name}-{dtype}"
            checkpoints = CheckpointManager(saver, target, CheckpointConfig())
            found = []
            for step in range(1, STEPS + 1):
                found.append(record(training, step))
                if step == SAVED_AT:
                    checkpoints.save(step, training.trainer.state_facts(), best=None)
            assert saver.finish() is None
            keep(target / "values.json", found)
            keep(target / "adapter.safetensors", gather_trainable(training.model))
            checkpoints.saver.restore(target / folder_name(SAVED_AT), SAVED_AT)
            keep(target / "back.safetensors", gather_trainable(training.model))


def go_on(base: Path, folder: Path, device: torch.device) -> None:
    """The rest of those runs, from where they were saved."""
    world = dist.get_world_size()
    for name, layout in LAYOUTS[world].items():
        mine = f"{world}-{name}"
        kinds = ("fp32",) if name == "eight_bits" else dtypes(world)
        elsewhere = [(source, "fp32") for source, targets in ROUTES.items() if mine in targets]
        for source, dtype in [*elsewhere, *((mine, dtype) for dtype in kinds)]:
            training = build(recipe_of(base, layout, base__dtype=dtype), device, rows())
            saved = find_newest_checkpoint(folder / f"{source}-{dtype}", [])
            restore(saved, training.saver(), training.trainer)
            found = [record(training, step) for step in range(SAVED_AT + 1, STEPS + 1)]
            target = folder / f"{mine}-{dtype}" / f"from-{source}"
            keep(target / "values.json", found)
            keep(target / "adapter.safetensors", gather_trainable(training.model))


def dtypes(world: int) -> tuple[str, ...]:
    return ("fp32", "bf16") if world in BF16_WORLDS else ("fp32",)


def record(training: Training, step: int) -> list[float]:
    report = training.step(step)
    return [report.losses.mean(), report.grad_norm, report.learning_rate, *report.router.weights.flatten().tolist()]


def main(mode: str, base: str, folder: str) -> None:
    silence_libraries()
    with process_group() as device:
        {"save": save, "go_on": go_on}[mode](Path(base), Path(folder), device)
        dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
