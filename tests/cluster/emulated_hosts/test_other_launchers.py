"""Launchers that need no ssh: the same command is started on each node by hand, with that node's number."""

import pytest

from tests.support.cluster.emulated import NODES, ended
from tests.support.cluster.launching import LIMIT, PASSED_ON, PORTS
from tests.support.workplace import SCRIPT, ZERO3

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "deepspeed": ("deepspeed", "--hostfile", "by_hand", "--no_ssh"),
    "torchrun": ("torchrun", f"--nnodes={len(NODES)}", "--nproc_per_node=1"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_started_on_each_node_two_hosts_train_as_two_ranks_on_one(shared, cluster, launcher):
    (shared.folder / "by_hand").write_text("".join(f"{node} slots=1\n" for node in NODES))
    port, run = str(next(PORTS)), f"by_hand_{launcher}"
    place = {"folder": shared.folder, "env": shared.environment(**PASSED_ON), "timeout": LIMIT}
    begun = []
    for number, node in enumerate(NODES):
        meeting = (f"--node_rank={number}", f"--master_addr={NODES[0]}", f"--master_port={port}")
        recipe = (SCRIPT, "recipe.yaml", ZERO3, f"run.name={run}", f"run.nodes={len(NODES)}")
        begun.append(cluster.nodes[node].begin(*LAUNCHERS[launcher], *meeting, *recipe, **place))
    done = [ended(launched) for launched in begun]
    assert [node.returncode for node in done] == [0, 0], "".join(node.stdout + node.stderr for node in done)
    assert "ranks           2 on 2 nodes: node-a (1), node-b (1); on CPU; eth0; met in " in done[0].stdout
    expected, found = shared.records("one_host"), shared.records(run)
    for key in ("step", "loss", "grad_norm"):
        assert [record[key] for record in found] == [record[key] for record in expected], key
    assert cluster.wait_until_idle() == []
