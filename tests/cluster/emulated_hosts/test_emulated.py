"""The emulated hosts are hosts: they know one another by ssh, can be cut off, and leave nothing behind."""

import os
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from tests.support.cluster.emulated import ALIAS, HOME, NODES, emulated

pytestmark = pytest.mark.slow


def reached(cluster, host: str) -> str:
    """The name that the host gives itself over ssh from the launching host, or ''."""
    return cluster.launcher.run("ssh", "-o", "ConnectTimeout=3", host, "hostname").stdout.strip()


def test_hosts_have_names_homes_and_processes_of_their_own(cluster):
    for node in NODES:
        assert reached(cluster, node) == node
        cluster.nodes[node].run("touch", f"{HOME}/.ssh/{node}")
    assert reached(cluster, ALIAS) == "node-a"
    seen = cluster.nodes["node-a"].run("sh", "-c", "ls ~/.ssh; ps -e -o comm=").stdout.split()
    assert "node-a" in seen
    assert "node-b" not in seen
    assert {"sshd", "ps"} <= set(seen)
    assert len(seen) < 15


def test_a_cut_link_keeps_one_node_away_until_it_is_restored(cluster):
    with cluster.cut_off("node-a"):
        assert [reached(cluster, node) for node in NODES] == ["", "node-b"]
    assert reached(cluster, "node-a") == "node-a"


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(can_emulate, tmp_path, fails):
    def state() -> tuple:
        return os.listdir("/sys/class/net"), Path("/proc/mounts").read_text(), Path("/etc/hosts").read_text()

    before = state()
    with pytest.raises(ValueError) if fails else nullcontext(), emulated(tmp_path) as cluster:
        node = cluster.nodes["node-b"]
        node.run("sh", "-c", "sleep 1000 > /dev/null 2>&1 &")
        started = [*node.processes(), *map(psutil.Process, (node.init, cluster.launcher.init))]
        assert len(started) == 3
        if fails:
            raise ValueError
    assert state() == before
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
