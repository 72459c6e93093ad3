"""`bash launch/train.sh hostfile=F`: two hosts train as one; a fault ends everywhere, is named, and is survived."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.conftest import Train
from tests.cluster.emulated import NODES, ended
from tests.cluster.test_two_hosts import ADAPTER, refused
from tests.e2e.conftest import REPOSITORY
from tests.e2e.test_lost_ranks import wait_for_steps
from trainer.launch_protocol import STOPPED

pytestmark = pytest.mark.slow

TIMEOUT = 8  # seconds that a rank waits for another
BOUND = 1.6 * TIMEOUT + 15  # seconds from a fault to the end: the rest is for a loaded machine
ENDLESS = {
    "train__steps": 2000,
    "train__eval_every": 0,
    "run__collective_timeout": TIMEOUT,
    "run__start_timeout": 60,
    "checkpoint__save_every": 5,
}
RAISES = """
import signal
def _raise(number, frame):
    raise ValueError("the disk is on fire")
signal.signal(signal.SIGUSR2, _raise)
"""


def told_after(harm: Callable[[], object], train: Train, run: str) -> str:
    """All that a supervised launch on both nodes told, which the harm ended with a failure, within the bound."""
    launched = train.begin_supervised(*NODES, run__name=run, **ENDLESS)
    wait_for_steps(train.place.folder / "runs" / run / "metrics.jsonl", 2)
    harm()
    since = time.monotonic()
    done = ended(launched)
    assert time.monotonic() - since < BOUND
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout + done.stderr


def cause(told: str) -> str:
    (line,) = [line for line in told.splitlines() if line.startswith("launch          failed on ")]
    return line.removeprefix("launch          failed on ")


def test_two_hosts_train_as_two_ranks_on_one(shared, cluster, train):
    done = ended(train.begin_supervised(*NODES, run__name="supervised"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node-a: ranks           2 on 2 nodes: node-a (1), node-b (1); eth0; met in " in done.stdout
    expected, found = shared.records("one_host"), shared.records("supervised")
    for key in ("step", "loss", "grad_norm"):
        assert [record[key] for record in found] == [record[key] for record in expected], key
    one, two = (load_file(shared.folder / "runs" / run / ADAPTER) for run in ("one_host", "supervised"))
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    assert cluster.wait_until_idle(5) == []


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named(cluster, train, lost):
    told = told_after(lambda: cluster.nodes[NODES[lost]].ranks()[lost].kill(), train, f"supervised_killed_{lost}")
    assert cause(told) == f"{NODES[lost]}, rank {lost}: killed from outside, as by SIGKILL or for want of memory"
    assert cluster.wait_until_idle(2) == []


def test_a_halted_rank_is_named_and_ended(cluster, train):
    told = told_after(lambda: cluster.nodes["node-b"].ranks()[1].suspend(), train, "supervised_halted")
    assert cause(told) == "node-b, rank 1: was halted, as by SIGSTOP or a debugger, and was killed"
    assert cluster.wait_until_idle(2) == []


def test_an_exception_on_one_rank_is_named(cluster, train, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(RAISES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    harm = lambda: cluster.nodes["node-b"].ranks()[1].send_signal(signal.SIGUSR2)  # noqa: E731
    told = told_after(harm, train, "supervised_raised")
    assert cause(told) == "node-b, rank 1: ValueError: the disk is on fire"
    assert cluster.wait_until_idle(2) == []


def test_a_node_that_is_cut_off_is_named(cluster, train):
    with ExitStack() as cut:
        told = told_after(lambda: cut.enter_context(cluster.cut_off("node-b")), train, "supervised_cut")
        assert cluster.wait_until_idle(TIMEOUT) == []
    assert cause(told).startswith("node-b: ")


def test_a_node_that_does_not_come_is_refused_or_left_out(shared, cluster, train):
    with cluster.cut_off("node-b"):
        line = refused(ended(train.begin_supervised(*NODES, options=["check=false"], run__name="absent")), cluster)
        assert line.startswith("error: 1 of 2 nodes answer, and min_nodes=2: node-b: ssh: connect to host node-b")
        options = ["check=false", "min_nodes=1"]
        done = ended(train.begin_supervised(*NODES, options=options, run__name="without"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launch          without node-b: ssh: connect to host" in done.stdout
    assert len(shared.records("without")) == 4


@contextmanager
def unable_to_meet(cluster) -> Iterator[None]:
    """node-b does not reach node-a, and both are reached by the launching host."""
    cluster.nodes["node-b"].run("ip", "route", "add", "unreachable", "198.51.100.2")
    try:
        yield
    finally:
        cluster.nodes["node-b"].run("ip", "route", "del", "unreachable", "198.51.100.2")


def test_ranks_that_do_not_meet_say_so_in_one_line(cluster, train):
    with unable_to_meet(cluster):
        started = time.monotonic()
        options = {**ENDLESS, "run__start_timeout": TIMEOUT}
        launched = train.begin_supervised(*NODES, options=["check=false"], run__name="apart", **options)
        done = ended(launched)
    assert time.monotonic() - started < BOUND + 30  # imports
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "the ranks did not meet at 198.51.100.2:" in cause(done.stderr)
    assert cluster.wait_until_idle(2) == []


def steps_of(records: list[dict]) -> list[int]:
    return [record["step"] for record in records]


@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_a_supervised_run_goes_on_after_a_fault(shared, cluster, train, fault):
    """After a kill on both nodes; without the node that does not answer."""
    run = f"goes_on_{fault.replace(' ', '_')}"
    options = ["retries=1", "min_nodes=1"]
    launched = train.begin_supervised(
        *NODES, options=options, run__name=run, **{**ENDLESS, "train__steps": 150, "checkpoint__save_every": 25}
    )
    with ExitStack() as cut:
        wait_for_steps(shared.folder / "runs" / run / "metrics.jsonl", 60)
        if fault == "killed":
            cluster.nodes["node-b"].ranks()[1].kill()
        else:
            cut.enter_context(cluster.cut_off("node-b"))
        done = ended(launched)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting again, retry 1 of 1" in done.stdout
    assert ("launch          without node-b" in done.stdout) == (fault == "cut off")
    assert steps_of(shared.records(run)) == list(range(1, 151))
    assert (shared.folder / "runs" / run / ADAPTER).is_file()


def test_a_signal_to_the_supervisor_saves_the_run_of_both_hosts(shared, cluster, train):
    launched = train.begin_supervised(*NODES, run__name="supervised_stop", **ENDLESS)
    wait_for_steps(shared.folder / "runs" / "supervised_stop" / "metrics.jsonl", 2)
    supervisor(cluster).terminate()
    done = ended(launched)
    assert done.returncode == STOPPED, done.stdout + done.stderr
    assert "as a signal asked; saved in runs/supervised_stop/checkpoints; start again to go on" in done.stdout
    assert cluster.wait_until_idle(2) == []


def test_a_supervisor_that_is_killed_leaves_a_saved_run_and_nothing_running(shared, cluster, train):
    launched = train.begin_supervised(*NODES, run__name="orphaned", **ENDLESS)
    wait_for_steps(shared.folder / "runs" / "orphaned" / "metrics.jsonl", 2)
    supervisor(cluster).kill()
    launched.wait()
    assert cluster.wait_until_idle(BOUND) == []
    assert (shared.folder / "runs" / "orphaned" / "checkpoints" / "latest").exists()


def supervisor(cluster) -> psutil.Process:
    program = str(REPOSITORY / "launch" / "supervise.py")
    (found,) = [process for process in cluster.launcher.processes() if process.cmdline()[1:2] == [program]]
    return found
