"""A rank that is killed, or a node that is cut off, ends the run on the other host too, which says why."""

import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.support.cluster.emulated import NODES, ended
from tests.support.cluster.launching import Train
from tests.support.workplace import wait_for_steps

pytestmark = pytest.mark.slow

TIMEOUT = 8  # seconds that a rank waits for another
LIMIT = 120  # seconds, for a launch to end after the harm


def told_after(harm: Callable[[], object], train: Train, run: str) -> str:
    """All that a launch on both nodes told, which the harm ended with a failure, and soon."""
    endless = {"train__steps": 2000, "train__eval_every": 0, "run__collective_timeout": TIMEOUT}
    launched = train.begin(*NODES, run__name=run, **endless)
    wait_for_steps(train.metrics(run), 2)
    harm()
    since = time.monotonic()
    done = ended(launched)
    assert time.monotonic() - since < LIMIT
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_run_on_both_hosts(cluster, train, lost):
    told = told_after(lambda: cluster.nodes[NODES[lost]].ranks()[lost].kill(), train, f"killed_{lost}")
    survivor = 1 - lost
    assert f"rank {survivor}: another rank has ended or does not answer" in told
    assert f"{NODES[lost]}: ssh exited with exit code 247" in told  # DeepSpeed's -9
    assert cluster.wait_until_idle() == []


def test_a_node_that_is_cut_off_ends_the_run_on_both_hosts(cluster, train):
    with ExitStack() as cut:
        told = told_after(lambda: cut.enter_context(cluster.cut_off("node-b")), train, "cut_off")
        assert cluster.wait_until_idle() == []
    assert "rank 0: another rank has ended or does not answer" in told
    assert "node-b: ssh exited with exit code 255" in told
