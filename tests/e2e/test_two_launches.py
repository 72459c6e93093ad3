"""Two launches of one run, by the real commands: one trains, the other names it; and after a kill the next goes on."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence

import pytest

from tests.support.workplace import SCRIPT, ZERO3, ranks_of, wait_for_steps

pytestmark = pytest.mark.slow

LIMIT = 300  # seconds
CHANGES = ["train.steps=100000", "train.eval_every=0", "checkpoint.save_every=20", "report.tensorboard=false"]
NUMBERS = ("step", "loss", "grad_norm", "learning_rate")


@pytest.fixture
def launch(workplace):
    """Begins a launch of a run by a command; none outlives the test."""
    begun: list[subprocess.Popen] = []

    def begin(run: str, *command: str, overrides: Sequence[str] = CHANGES) -> subprocess.Popen:
        process = subprocess.Popen(
            [*command, "recipe.yaml", f"run.name={run}", *overrides],
            cwd=workplace.folder,
            env=workplace.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def numbers(workplace, run: str) -> list[list[float]]:
    return [[record[key] for key in NUMBERS] for record in workplace.records(run)]


def stop_after(workplace, process: subprocess.Popen, run: str, steps: int) -> str:
    wait_for_steps(workplace.folder / "runs" / run / "metrics.jsonl", steps)
    process.terminate()
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, err
    return out


def test_two_launches_at_once_train_the_run_once_and_a_kill_delays_no_start(workplace, launch):
    run = workplace.folder / "runs" / "contended"
    both = [launch("contended", "teamlora", "train") for _ in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.1)
    (refused,) = (process for process in both if process.poll() is not None)
    (first,) = (process for process in both if process is not refused)
    _, said = refused.communicate()
    assert refused.returncode == 2, said
    assert re.fullmatch(
        rf"error: runs/contended: another launch trains there: process {first.pid} on {os.uname().nodename}, since "
        r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ; wait until it ends, stop it \(after SIGTERM it saves first\), or give "
        r"another run\.name\n",
        said,
    )

    launched = launch("contended", "bash", SCRIPT, "num_gpus=2", "retries=2", overrides=[ZERO3, *CHANGES])
    _, said = launched.communicate(timeout=LIMIT)
    assert launched.returncode == 2, said
    assert said.count(f"error: runs/contended: another launch trains there: process {first.pid} on ") == 1
    wait_for_steps(run / "metrics.jsonl", 21)
    assert first.poll() is None

    first.send_signal(signal.SIGKILL)
    first.wait(LIMIT)
    assert len(list((run / ".lease").iterdir())) == 1
    steps = len((run / "metrics.jsonl").read_text().splitlines()) + 5
    said = stop_after(workplace, launch("contended", "teamlora", "train"), "contended", steps)
    assert "lease  " not in said, "it waited"
    assert not (run / ".lease").exists()
    assert not ranks_of("contended")

    stop_after(workplace, launch("alone", "teamlora", "train"), "alone", steps)
    expected = numbers(workplace, "alone")[:steps]
    assert [step for step, *_ in expected] == list(range(1, steps + 1))
    assert numbers(workplace, "contended")[:steps] == expected
