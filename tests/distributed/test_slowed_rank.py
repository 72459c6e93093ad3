"""A rank that gets a tenth of its time is named, by real ranks, and an even load is not."""

import socket

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_models import tiny_llama

pytestmark = pytest.mark.slow

WINDOWS = {"slowed": 20.0, "even": 5.0}  # seconds
# Trains for a window. Rank 1 is suspended for nine tenths of the time if asked: twice a second, so that this strikes
# often enough within the second or two in which it computes what is timed.
TRAIN = """
import os, socket, subprocess, sys, time
import numpy as np
import torch.distributed as dist
from pathlib import Path
from tests.support import scene
from tests.support.tiny_training import build
from trainer.distributed.process_group import process_group
from trainer.telemetry.slow_ranks import SlowRanks

base, load, window = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
SUSPEND = f"while kill -STOP {os.getpid()}; do sleep 0.45; kill -CONT {os.getpid()}; sleep 0.05; done 2> /dev/null"
with process_group() as device:
    recipe = scene.recipe(base)
    parts = [scene.rows(12, seed=seed) for seed in range(4)]  # about 300 tokens each
    rows = [{key: np.concatenate([part[key] for part in row]) for key in row[0]} for row in parts]
    training = build(recipe, device, rows)
    training.step(1)
    if load == "slowed" and dist.get_rank() == 1:
        subprocess.Popen(["sh", "-c", SUSPEND])  # ends with this process
    trainer = training.trainer
    trainer.slow_ranks = SlowRanks(training.model, device, [socket.gethostname()] * 2, window)
    until, late = time.monotonic() + window, 0
    while not late:
        training.step(2)
        (late,) = trainer._sum_over_ranks(int(time.monotonic() > until))
    trainer.next_input()
"""


@pytest.mark.parametrize("load", WINDOWS)
def test_a_rank_with_a_tenth_of_its_time_is_named_and_none_without(tmp_path, load):
    base = tiny_llama(tmp_path / "base", hidden_size=256, intermediate_size=512, vocab_size=300, num_hidden_layers=2)
    said = run_ranks(2, ["-c", TRAIN, str(base), load, str(WINDOWS[load])], limit=1200)
    named = [line for text in said for line in text.splitlines() if line.startswith("warning: rank ")]
    if load == "even":
        assert named == []
    else:
        (line,) = named
        assert line.startswith(f"warning: rank 1 on {socket.gethostname()} computes "), said
