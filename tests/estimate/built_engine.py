"""Builds an engine for each ZeRO stage, runs one step, and writes the bytes it holds to FOLDER/held.json.

python -m tests.estimate.built_engine BASE FOLDER      (with RANK, WORLD_SIZE, ... set)
"""

import json
import sys
from pathlib import Path

import torch

from tests.support import scene
from tests.support.engine_bytes import copied_bytes, learning_bytes, storage_bytes
from tests.support.tiny_training import build
from trainer.base.nf4 import NF4Linear
from trainer.console.library_logs import silence_libraries
from trainer.distributed.process_group import process_group
from trainer.recipe import Recipe
from trainer.telemetry.startup import bytes_on_this_rank

STAGES = (0, 1, 2, 3)


def recipe_of(base: Path, folder: Path, stage: int, dtype: str) -> Recipe:
    """A recipe on ds_configs/zero3.json, or on zero2.json with its stage replaced."""
    found = json.loads(Path(f"ds_configs/zero{3 if stage == 3 else 2}.json").read_text())
    found["zero_optimization"]["stage"] = stage
    config = folder / f"stage{stage}.json"
    config.write_text(json.dumps(found))
    return scene.recipe(base, base__dtype=dtype, deepspeed__config=str(config))


def held(recipe: Recipe, stage: int, device: torch.device) -> dict[str, int]:
    """Bytes by category after a step, as the run reports them or as read from the engine's tensors."""
    training = build(recipe, device, scene.training_rows(recipe))
    model, saver = training.model, training.saver()
    training.step(1)
    reported, learning = bytes_on_this_rank(model, stage, 1), learning_bytes(training.engine)
    second = [m.second for m in model.modules() if isinstance(m, NF4Linear)]
    return {
        **{category: reported[category] for category in ("packed weights", "absmax", "unquantised", "adapter")},
        **{category: learning[category] for category in ("master copy", "optimizer moments")},
        "absmax, second level": storage_bytes(t for level in second for t in (level.absmax, level.code, level.offset)),
        "buffers": storage_bytes(model.buffers()),
        "checkpoint copy": copied_bytes(saver),
    }


def main(base: Path, folder: Path) -> None:
    silence_libraries()
    with process_group() as device:
        found = {
            f"{stage}-{dtype}": held(recipe_of(base, folder, stage, dtype), stage, device)
            for stage in STAGES
            for dtype in ("fp32", "bf16")
        }
    (folder / "held.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
