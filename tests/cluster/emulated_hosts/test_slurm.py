"""`sbatch launch/slurm.sbatch` on two nodes: the same training, and every way in which a job stops and goes on."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.emulated_hosts.test_two_hosts import ADAPTER
from tests.support.cluster.launching import PASSED_ON, PORTS
from tests.support.cluster.slurm import Slurm, slurm_on, why_not
from tests.support.workplace import SCRIPT, ZERO3, Workplace
from trainer.run.launch_protocol import MISTAKE, STOPPED

pytestmark = pytest.mark.slow

STEPS = 160
LONG = (f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.save_every=30")
NUMBERS = ("step", "loss", "grad_norm", "learning_rate", "router_weight")


@pytest.fixture(scope="module")
def queue(shared, tmp_path_factory) -> Iterator[Slurm]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm_on(tmp_path_factory.mktemp("slurm"), shared, PASSED_ON) as slurm:
        yield slurm


@pytest.fixture
def slurm(queue) -> Iterator[Slurm]:
    """The queue without jobs, whatever a test leaves."""
    yield queue
    queue.run("scancel", "--user=root")


@pytest.fixture(scope="module")
def unbroken(shared) -> str:
    """A run of two ranks on one host that nothing happened to."""
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(next(PORTS)), SCRIPT, "recipe.yaml", ZERO3]
    done = shared.run(*command, "run.name=unbroken", *LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    return "unbroken"


def assert_equal_runs(place: Workplace, found: str, expected: str) -> None:
    """The same numbers at each step, once each, and the same adapter, bit for bit."""
    numbers = [[[record[key] for key in NUMBERS] for record in place.records(run)] for run in (found, expected)]
    assert numbers[0] == numbers[1]
    adapters = [load_file(place.folder / "runs" / run / ADAPTER) for run in (found, expected)]
    torch.testing.assert_close(*adapters, rtol=0, atol=0)


def kill(slurm: Slurm, rank: int) -> None:
    """Kills a rank, and waits until the others have ended too."""
    os.kill(slurm.ranks()[rank], signal.SIGKILL)
    ending = time.monotonic() + 60
    while slurm.ranks():
        assert time.monotonic() < ending, "a rank outlives another"
        time.sleep(0.1)


def test_two_nodes_train_as_two_ranks_on_one_host(shared, slurm):
    named = ",".join(slurm.environment)  # and so none that the job sets itself
    job = slurm.submit("slurm", options=[f"--export={named}"])
    assert job.end() == ("COMPLETED", 0), job.said()
    assert "ranks           2 on 2 nodes: node-a (1), node-b (1); on CPU; eth0; met in " in job.said()
    assert_equal_runs(shared, "slurm", "one_host")


def test_a_mistake_ends_the_job_with_its_line_and_is_not_tried_again(slurm):
    job = slurm.submit("mistaken", "train.steps=-1", RETRIES="1")
    assert job.end() == ("FAILED", MISTAKE), job.said()
    assert "error: recipe.yaml: train.steps=-1: " in job.said()
    assert (job.fact("Restarts"), "starting again" in job.said()) == ("0", False)


def test_signalled_and_requeued_a_job_ends_as_the_unbroken_run(shared, slurm, unbroken):
    job = slurm.submit("requeued", *LONG)
    while not slurm.ranks():
        time.sleep(0.02)
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)  # what Slurm does before the time limit
    job.requeued(1)
    job.come_to(50)
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    job.requeued(2)
    assert "saved in runs/requeued/checkpoints" in job.said()
    assert f"node-a: task 0: Exited with exit code {STOPPED}" in job.said()
    job.come_to(len(shared.records("requeued")) + 20)
    slurm.run("scontrol", "requeue", job.number)
    assert job.end() == ("COMPLETED", 0), job.said()
    assert job.fact("Restarts") == "3"
    assert job.said().count("into the queue again") == 2
    assert_equal_runs(shared, "requeued", unbroken)


def test_killed_retried_and_cancelled_a_run_ends_as_the_unbroken_one(shared, slurm, unbroken):
    job = slurm.submit("broken", *LONG)
    job.come_to(40)
    kill(slurm, rank=1)
    assert job.end() == ("FAILED", 128 + signal.SIGKILL), job.said()
    assert "rank 0: another rank has ended or does not answer" in job.said()

    job = slurm.submit("broken", *LONG, RETRIES="1")
    job.come_to(70)
    kill(slurm, rank=0)
    job.come_to(len(shared.records("broken")) + 30)
    assert job.said().count("starting again, 0 retries left") == 1
    slurm.run("scancel", job.number)
    assert job.end()[0] == "CANCELLED", job.said()
    assert "saved in runs/broken/checkpoints" in job.said()
    latest = (job.directory / "checkpoints" / "latest").read_text()
    assert latest == f"step-{len(shared.records('broken')):06d}\n"

    job = slurm.submit("broken", *LONG)
    assert job.end() == ("COMPLETED", 0), job.said()
    assert_equal_runs(shared, "broken", unbroken)


def test_before_its_time_limit_a_job_saves_and_queues_itself(slurm):
    limit = ["--time=1", "--signal=B:USR1@15"]  # a minute; from 45 to 15 seconds before its end
    job = slurm.submit("limited", "train.steps=20000", "train.eval_every=0", options=limit)
    job.requeued(1)
    slurm.run("scancel", job.number)
    assert f"node-a: task 0: Exited with exit code {STOPPED}" in job.said()
    assert "as a signal asked; " in job.said()
