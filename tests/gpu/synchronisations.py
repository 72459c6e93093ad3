"""Where one training step waits for the GPU: python -m tests.gpu.synchronisations BASE OUTPUT (part 3)."""

import json
import sys
import warnings
from pathlib import Path

import torch

from tests.support import scene
from tests.support.tiny_training import build
from trainer.distributed.process_group import process_group


def main() -> None:
    base, output = Path(sys.argv[1]), Path(sys.argv[2])
    recipe = scene.recipe(base, stage=0)
    with process_group() as device:
        training = build(recipe, device, scene.training_rows(recipe))
        training.measure_routers_every(recipe.train.steps + 1)
        for number in (1, 2):
            training.step(number)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.step(3)
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
    output.write_text(json.dumps(places))


if __name__ == "__main__":
    main()
