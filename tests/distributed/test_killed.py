"""A rank killed while the base loads: the other ends with it, nothing is left behind, the next start is clean."""

from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_models import tiny_llama

pytestmark = pytest.mark.slow

LOAD = """
import os, signal, sys
import torch.distributed as dist
from pathlib import Path
from tests.support import scene
from trainer.base.loader import bytes_to_read, load_opened
from trainer.base.weight_map import open_base
from trainer.distributed.zero3_sharding import Zero3Sharding
from trainer.objective.batches import plan_batches
from trainer.distributed.deepspeed_config import read_deepspeed_config
from trainer.distributed.process_group import process_group

def half_way(done):
    if sys.argv[2] == "kill" and dist.get_rank() == 1 and done > bytes_to_read(opened, shards.world) / 2:
        os.kill(os.getpid(), signal.SIGKILL)

with process_group() as device:
    recipe = scene.recipe(Path(sys.argv[1]))
    opened = open_base(recipe.base)
    shards = Zero3Sharding(read_deepspeed_config(recipe, plan_batches(4, 1, 2)), device, 2)
    load_opened(opened, shards, half_way)
"""


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended
        return ""


def test_a_rank_killed_while_loading_ends_the_other_and_leaves_nothing(tmp_path):
    folder = tiny_llama(tmp_path / "base", num_hidden_layers=6)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(RuntimeError, match=r"rank \d of 2 ended with"):
        run_ranks(2, ["-c", LOAD, str(folder), "kill"], limit=600)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in read(path)]
    run_ranks(2, ["-c", LOAD, str(folder), "live"], limit=600)
