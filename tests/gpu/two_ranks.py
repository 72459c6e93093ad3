"""One rank of `test_5_two_ranks`: python -m tests.gpu.two_ranks BASE OUTPUT [PARALLEL_SIZE], under a launcher.

All ranks share the first GPU, over gloo: NCCL refuses two ranks on one card.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from tests.support import scene
from tests.support.tiny_training import build
from trainer.distributed import process_group


def main() -> None:
    base, output, parallel_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    os.environ["LOCAL_RANK"] = "0"
    process_group.BACKENDS["cuda"] = "gloo"
    recipe = scene.recipe(base, experts__parallel_size=parallel_size)
    with process_group.process_group() as device:
        training = build(recipe, device, scene.training_rows(recipe))
        losses = [training.step(number).losses.mean() for number in range(1, scene.STEPS + 1)]
        if dist.get_rank() == 0:
            output.write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
