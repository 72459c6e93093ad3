"""Ranks that a signal from C code ends, as NCCL's watchdog does at a time-out: what they leave for their launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.cluster.launch_outcome import KILLED
from trainer.cluster.local_ranks import LocalRanks
from trainer.run.crash import CAUSES, crash_ending, crash_stacks
from trainer.run.launch_protocol import ENDINGS, FAULT, Ending

# A rank that a thread of C ends while Python waits in a collective, as NCCL's watchdog does.
RANK = """
import ctypes, time
from trainer.run.crash import record_crashes
record_crashes()
libc = ctypes.CDLL(None)
def all_reduce():
    libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, getattr(libc, "{function}"), {argument})
    time.sleep(60)
all_reduce()
"""
ABORT = RANK.format(function="abort", argument=None)
SEGMENTATION_FAULT = RANK.format(function="raise", argument=11)
# As DeepSpeed's: the rank is its child.
LAUNCHER = """
import os, subprocess, sys
rank = subprocess.run([sys.executable, "-c", sys.argv[1]], env={**os.environ, "RANK": "0"})
sys.exit(rank.returncode != 0)
"""
WATCHDOG = """Fatal Python error: Aborted

Thread 0x00007f1 (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 355 in wait

Thread 0x00007f2 (most recent call first):
  File "/venv/torch/distributed/distributed_c10d.py", line 3004 in all_reduce
  File "/trainer/training/trainer.py", line 140 in train_step

Extension modules: numpy, torch
"""


def test_nccls_watchdog_is_told_by_the_place_of_the_main_thread_and_may_follow_from_another_rank():
    line = f"crashed (Aborted) in all_reduce, distributed_c10d.py line 3004; {CAUSES[signal.SIGABRT]}"
    assert crash_ending(WATCHDOG) == Ending(FAULT, line, followed=True)


@pytest.mark.parametrize(
    ("program", "signal", "followed"),
    [(ABORT, "Aborted", True), (SEGMENTATION_FAULT, "Segmentation fault", False)],
    ids=["abort", "segmentation fault"],
)
def test_a_crash_is_read_from_what_python_wrote(tmp_path, program, signal, followed):
    environment = {**os.environ, ENDINGS: str(tmp_path), "RANK": "3"}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode < 0
    ending = crash_ending(crash_stacks(tmp_path, 3))
    assert ending.line.startswith(f"crashed ({signal}) in all_reduce, <string> line ")
    assert (ending.status, ending.followed) == (FAULT, followed)
    assert crash_stacks(tmp_path, 4) == ""


def test_without_a_launcher_of_ours_the_stacks_go_to_stderr(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != ENDINGS}
    done = subprocess.run([sys.executable, "-c", ABORT], env=environment, capture_output=True, text=True)
    assert done.stderr.startswith("Fatal Python error: Aborted")


@pytest.mark.parametrize(("program", "expected"), [(ABORT, "crashed (Aborted)"), (SEGMENTATION_FAULT, "crashed (Seg"),
                                                   ("import time; time.sleep(1); import os; os.kill(os.getpid(), 9)",
                                                    KILLED)])  # fmt: skip
def test_a_launch_tells_a_crash_from_a_kill(program, expected, capfd):
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    ranks = LocalRanks(
        [sys.executable, "-c", LAUNCHER, program], environment, grace=5.0, cwd=Path(__file__).parent.parent.parent
    )
    while ranks.poll():
        time.sleep(0.05)
    found = ranks.outcome()
    assert found.status == FAULT
    assert found.cause.startswith(f"rank 0: {expected}")
    assert ("in all_reduce" in capfd.readouterr().err) == (expected != KILLED)
