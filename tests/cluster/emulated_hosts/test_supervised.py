"""`bash launch/train.sh hostfile=F`: two hosts train as one; a fault ends everywhere, is named, and is survived."""

import re
import time
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.emulated_hosts.test_two_hosts import ADAPTER, refused
from tests.support.cluster.emulated import NODES, ended
from tests.support.cluster.faults import FAULTS, write_raises
from tests.support.cluster.launching import unable_to_meet
from tests.support.workplace import wait_for_steps
from trainer.run.launch_protocol import STOPPED

pytestmark = pytest.mark.slow

TIMEOUT = 8  # seconds that a rank waits for another
BOUND = 1.4 * TIMEOUT + 60  # seconds from a fault to the end: the rest is for a slow or loaded machine
ENDLESS = {
    "train__steps": 2000,
    "train__eval_every": 0,
    "run__collective_timeout": TIMEOUT,
    "run__start_timeout": 60,
    "checkpoint__save_every": 5,
}
SHORT = {"train__steps": 80, "checkpoint__save_every": 10}  # with time for a fault after step 30


def cause(told: str) -> str:
    (line,) = [line for line in told.splitlines() if line.startswith("launch          failed on ")]
    return line.removeprefix("launch          failed on ")


def test_two_hosts_train_as_two_ranks_on_one(shared, cluster, train):
    done = ended(train.begin_supervised(*NODES, run__name="supervised"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node-a: ranks           2 on 2 nodes: node-a (1), node-b (1); on CPU; eth0; met in " in done.stdout
    expected, found = shared.records("one_host"), shared.records("supervised")
    for key in ("step", "loss", "grad_norm"):
        assert [record[key] for record in found] == [record[key] for record in expected], key
    one, two = (load_file(shared.folder / "runs" / run / ADAPTER) for run in ("one_host", "supervised"))
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    assert cluster.wait_until_idle() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_launch_everywhere_within_its_bound_and_is_named(cluster, train, fault, tmp_path, monkeypatch):
    write_raises(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = fault.replace(" ", "_")
    launched = train.begin_supervised(*NODES, options=["check=false"], run__name=run, **ENDLESS)
    wait_for_steps(train.metrics(run), 2)
    with FAULTS[fault].harm(cluster):
        since = time.monotonic()
        done = ended(launched)
        assert cluster.wait_until_idle(BOUND - (time.monotonic() - since)) == []
    assert done.returncode == 1, done.stdout + done.stderr
    assert cause(done.stderr).startswith(FAULTS[fault].cause)


def test_a_node_that_does_not_come_is_refused_or_left_out(shared, cluster, train):
    with cluster.cut_off("node-b"):
        checked = ended(train.begin_supervised(*NODES, run__name="absent"))
        assert re.search(r"^error +node-b +reached +not reached: ssh: connect to host node-b", checked.stdout, re.M)
        assert refused(checked, cluster).startswith("error: nothing was started")
        line = refused(ended(train.begin_supervised(*NODES, options=["check=false"], run__name="absent")), cluster)
        assert line.startswith("error: 1 of 2 nodes answer, and min_nodes=2: node-b: ssh: connect to host node-b")
        done = ended(train.begin_supervised(*NODES, options=["min_nodes=1"], run__name="without"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launch          without node-b: ssh: connect to host" in done.stdout
    assert len(shared.records("without")) == 4


def test_ranks_that_do_not_meet_say_so_in_one_line(cluster, train):
    with unable_to_meet(cluster):
        options = {**ENDLESS, "run__start_timeout": TIMEOUT}
        launched = train.begin_supervised(*NODES, options=["check=false"], run__name="apart", **options)
        done = ended(launched)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "the ranks did not meet at 198.51.100.2:" in cause(done.stderr)
    assert cluster.wait_until_idle() == []


@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_a_supervised_run_goes_on_after_a_fault(shared, cluster, train, fault):
    """After a kill on both nodes; without the node that does not answer."""
    run = f"goes_on_{fault.replace(' ', '_')}"
    options = ["retries=1", "min_nodes=1"]
    launched = train.begin_supervised(*NODES, options=options, run__name=run, **ENDLESS | SHORT)
    with ExitStack() as cut:
        wait_for_steps(train.metrics(run), 30)
        if fault == "killed":
            cluster.nodes["node-b"].ranks()[1].kill()
        else:
            cut.enter_context(cluster.cut_off("node-b"))
        done = ended(launched)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting again, retry 1 of 1" in done.stdout
    assert ("launch          without node-b" in done.stdout) == (fault == "cut off")
    assert [record["step"] for record in shared.records(run)] == list(range(1, 81))
    assert (shared.folder / "runs" / run / ADAPTER).is_file()


def test_a_node_that_is_away_for_a_while_is_waited_for_by_retries(shared, cluster, train):
    """All nodes are needed, and a retry finds one of two: it asks again."""
    launched = train.begin_supervised(*NODES, options=["retries=1"], run__name="waited_for", **ENDLESS | SHORT)
    wait_for_steps(train.metrics("waited_for"), 30)
    with cluster.cut_off("node-b"):
        told = next((line for line in launched.stdout if "waiting for nodes: 1 of 2 nodes answer" in line), "")
    done = ended(launched)
    assert told and done.returncode == 0, done.stdout + done.stderr
    assert [record["step"] for record in shared.records("waited_for")] == list(range(1, 81))


def test_a_signal_to_the_supervisor_saves_the_run_of_both_hosts(shared, cluster, train):
    launched = train.begin_supervised(*NODES, run__name="supervised_stop", **ENDLESS)
    wait_for_steps(train.metrics("supervised_stop"), 2)
    train.supervisor().terminate()
    done = ended(launched)
    assert done.returncode == STOPPED, done.stdout + done.stderr
    assert "as a signal asked; saved in runs/supervised_stop/checkpoints; start again to go on" in done.stdout
    assert cluster.wait_until_idle() == []


def test_a_supervisor_that_is_killed_leaves_a_saved_run_and_nothing_running(shared, cluster, train):
    launched = train.begin_supervised(*NODES, run__name="orphaned", **ENDLESS)
    wait_for_steps(train.metrics("orphaned"), 2)
    train.supervisor().kill()
    launched.wait()
    assert cluster.wait_until_idle(BOUND) == []
    assert (shared.folder / "runs" / "orphaned" / "checkpoints" / "latest").exists()
