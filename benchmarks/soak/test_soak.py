"""That the soak plans what it says, finds its phases in the code, and would notice a run that is not equal."""

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.soak.kinds import AT_REST, KINDS
from benchmarks.soak.phases import IMPORTS, PHASES, Fault
from benchmarks.soak.plan import plan_run
from benchmarks.soak.run import Problem, check_ending, check_refused_for, difference

KILL = Fault("SIGKILL", "save", victim="rank 1")
FULL = Fault("disk full", "step")


def test_a_seed_stands_for_one_plan_and_all_kinds_are_drawn():
    plans = [plan_run(seed, True, 10.0) for seed in range(150)]
    assert plans == [plan_run(seed, True, 10.0) for seed in range(150)]
    starts = [start for plan in plans for start in plan.starts]
    assert {fault.kind for start in starts for fault in start.faults} == set(KINDS)
    assert {name for start in starts for name in start.before} == set(AT_REST)
    assert {plan.placed for plan in plans} == {True, False}


def test_without_a_disk_of_its_own_none_is_filled():
    starts = [start for seed in range(50) for start in plan_run(seed, False, 10.0).starts]
    assert not any(KINDS[fault.kind].own_disk for start in starts for fault in start.faults)
    assert not any("/dev/shm full" in start.before for start in starts)


def test_the_last_start_has_no_fault_and_the_one_before_none_that_must_end_it():
    for seed in range(50):
        *others, before, last = plan_run(seed, True, 10.0).starts
        assert last.faults == last.before == []
        assert not any(KINDS[fault.kind].ends for fault in before.faults)
        assert all(sum(KINDS[fault.kind].ends for fault in start.faults) == 1 for start in others)


def test_while_a_second_launch_is_refused_nothing_else_strikes_the_first():
    faults = [start.faults for seed in range(150) for start in plan_run(seed, True, 10.0).starts]
    assert {len(each) for each in faults if any(KINDS[fault.kind].alone for fault in each)} == {1}


REFUSED = "error: runs/soak-0: another launch trains there: process 41 on here, since 2026; wait until it ends, ..."


@pytest.mark.parametrize(
    ("pid", "status", "said"), [(41, 0, REFUSED), (4, 2, REFUSED), (41, 2, "error: runs/soak-0 is finished")]
)
def test_a_second_launch_must_be_refused_and_name_the_first(pid, status, said):
    check_refused_for(41, 2, REFUSED)
    with pytest.raises(Problem, match=f"did not name process {pid}, and ended with status {status}"):
        check_refused_for(pid, status, said)


def test_every_phase_is_a_function_of_the_trainer():
    assert {phase for kind in KINDS.values() for phase in kind.phases} - {IMPORTS} == set(PHASES)
    for module, name in PHASES.values():
        assert callable(functools.reduce(getattr, name.split("."), importlib.import_module(module)))


def run_folder(folder: Path, loss: float = 1.0, weight: float = 1.0, seconds: float = 1.0) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "step_seconds": seconds}) + "\n")
    save_file({"a": np.array([weight], np.float32)}, folder / "adapter" / "adapter_model.safetensors")
    return folder


def test_runs_are_equal_but_for_their_speed(tmp_path):
    expected = run_folder(tmp_path / "expected")
    assert difference(run_folder(tmp_path / "slow", seconds=2.0), expected) == ""
    assert (
        difference(run_folder(tmp_path / "loss", loss=1.0 + 2**-52), expected)
        == "metrics.jsonl differs at step 1: loss"
    )
    other = run_folder(tmp_path / "weight", weight=1.0 + 2**-23)
    assert difference(other, expected) == "1 tensors of the adapter differ, such as a"


@pytest.mark.parametrize(
    ("status", "said", "struck", "problem"),
    [
        (1, "launch failed on rank 1: killed from outside (SIGKILL, or out of memory)", [KILL], None),
        (0, "", [KILL], None),  # it came too late
        (0, "", [], None),
        (1, "", [], "ended with status 1, expected 0"),
        (2, "error: ...", [KILL], "ended with status 2, expected 0 or 1"),
        (1, "nothing of that", [FULL], "said nothing like 'No space left'"),
        (1, "Traceback: No space left", [FULL], "ended in a traceback"),
    ],
)
def test_how_a_start_may_end_follows_from_its_faults(status, said, struck, problem):
    if problem is None:
        check_ending(status, said, struck)
    else:
        with pytest.raises(Problem, match=problem):
            check_ending(status, said, struck)


SHOWS = """
import os, sys, time
from benchmarks.soak.forked import fork, show
def child():
    show(["python", "train", "run.name=x"], {"RANK": "1"})
    print(open("/proc/self/cmdline").read().strip("\\0").split("\\0"))
    print(open("/proc/self/environ").read().strip("\\0"), os.environ["HOME"])
    return 7
pid = fork(child)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_fork_shows_its_own_arguments_and_variables(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SHOWS],
        capture_output=True,
        text=True,
        env={"HOME": "/here", "PATH": "-" * 200, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.splitlines() == ["['python', 'train', 'run.name=x']", "RANK=1 /here", "7"], done.stderr
