"""DeepSpeed's launcher with a hostfile, over pdsh and ssh, on two hosts: the same training, and mistakes told."""

from subprocess import CompletedProcess

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.cluster.emulated import ALIAS, NODES, ended
from tests.support.cluster.launching import on_one_host
from tests.support.workplace import REPOSITORY, Workplace, wait_for_steps
from trainer.run.launch_protocol import MISTAKE, STOPPED

pytestmark = pytest.mark.slow

ADAPTER = "adapter/adapter_model.safetensors"


def errors(done: CompletedProcess) -> set[str]:
    """The different lines of ours that told an error; pdsh puts the node's name before each."""
    lines = (done.stdout + done.stderr).splitlines()
    return {line[line.index("error: ") :] for line in lines if "error: " in line}


def refused(done: CompletedProcess, cluster) -> str:
    """The one line that refused the launch, which has ended everywhere."""
    assert done.returncode == MISTAKE, done.stdout + done.stderr
    (line,) = errors(done)
    assert cluster.wait_until_idle() == []
    return line


def assert_same_training(place: Workplace, one: str, two: str) -> None:
    """Bit for bit, in the losses and gradient norms of all steps and in the adapter."""
    expected, found = place.records(one), place.records(two)
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in found] == [record[key] for record in expected], key
    adapters = (load_file(place.folder / "runs" / run / ADAPTER) for run in (two, one))
    torch.testing.assert_close(*adapters, rtol=0, atol=0)


def test_two_hosts_train_as_two_ranks_on_one(shared, cluster, train):
    done = train(*NODES, run__name="two_hosts", run__nodes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ranks           2 on 2 nodes: node-a (1), node-b (1); on CPU; eth0; met in " in done.stdout
    assert_same_training(shared, "one_host", "two_hosts")
    assert cluster.wait_until_idle() == []


@pytest.mark.parametrize("dispatch", ["weights", "tokens"])
def test_experts_placed_on_two_hosts_train_as_those_of_two_ranks_on_one(shared, cluster, train, dispatch):
    placed = {"experts__parallel_size": 2, "experts__across_nodes": True, "experts__dispatch": dispatch}
    one, two = f"{dispatch}_on_one", f"{dispatch}_on_two"
    on_one_host(shared, run__name=one, **placed)
    done = train(*NODES, run__name=two, run__nodes=2, **placed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "experts         1 of 2 on each of 2 ranks" in done.stdout
    assert_same_training(shared, one, two)
    assert cluster.wait_until_idle() == []


def test_a_signal_to_one_rank_saves_the_run_of_both_hosts(shared, cluster, train):
    launched = train.begin(*NODES, run__name="signalled", train__steps=2000, train__eval_every=0)
    wait_for_steps(shared.folder / "runs" / "signalled" / "metrics.jsonl", 2)
    cluster.nodes["node-b"].ranks()[1].terminate()
    done = ended(launched)
    assert done.returncode == STOPPED, done.stdout + done.stderr
    assert "as a signal asked; saved in runs/signalled/checkpoints; start again to go on" in done.stdout
    assert cluster.wait_until_idle() == []


def test_a_hostfile_that_is_missing_does_not_train_on_one_host_in_silence(cluster, train):
    line = refused(train(run__name="local", run__nodes=2), cluster)
    assert line.startswith("error: run.nodes=2, and the ranks are on 1: launcher (")
    assert "give the launcher an existing hostfile that lists every node" in line


def test_one_host_under_two_names_is_not_two_nodes(cluster, train):
    line = refused(train("node-a", ALIAS, run__name="twice", run__nodes=2), cluster)
    assert line.startswith("error: run.nodes=2, and the ranks are on 1: node-a (2); ")


def test_other_code_on_one_node_is_refused(cluster, train, tmp_path):
    changed = REPOSITORY / "trainer" / "errors.py"
    with cluster.nodes["node-b"].replaced(changed, changed.read_text() + "\nELSEWHERE = True\n", tmp_path):
        line = refused(train(*NODES, run__name="other_code"), cluster)
    assert line.startswith("error: rank 1 on node-b runs other code of this trainer than rank 0 on node-a; check out")


def test_another_recipe_on_one_node_is_refused(shared, cluster, train, tmp_path):
    values = yaml.safe_load(shared.recipe.read_text())
    values["train"]["learning_rate"] = 2e-3
    with cluster.nodes["node-b"].replaced(shared.recipe, yaml.safe_dump(values), tmp_path):
        line = refused(train(*NODES, run__name="other_recipe"), cluster)
    assert line.startswith("error: rank 1 on node-b has train.learning_rate=0.002, rank 0 on node-a has 0.001; give")
