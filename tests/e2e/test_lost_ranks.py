"""A rank that is killed, or fails alone, ends all others within half a minute, and they say why."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support.workplace import REPOSITORY, SCRIPT, ZERO3, ranks_of, wait_for_steps

pytestmark = pytest.mark.slow

LIMIT = 90  # seconds
PLACED = {
    "plain": [],
    "weights": ["experts.parallel_size=2", "experts.dispatch=weights"],
    "tokens": ["experts.parallel_size=2", "experts.dispatch=tokens"],
}
# The command itself, but that rank 1 fails in its third step.
FAILS_ALONE = """
import os, sys
from trainer.cli import main
from trainer.training.trainer import Trainer
real = Trainer.train_step
def train_step(self, given):
    if os.environ["RANK"] == "1" and self.state.step == 2:
        raise ValueError("the disk is on fire")
    return real(self, given)
Trainer.train_step = train_step
sys.exit(main(sys.argv[1:]))
"""


def arguments(run: str, *more: str) -> list[str]:
    return ["recipe.yaml", f"run.name={run}", "train.steps=2000", "train.eval_every=0", ZERO3, *more]


@pytest.mark.parametrize("dispatch", PLACED)
def test_a_killed_rank_ends_the_run_with_its_cause(workplace, dispatch):
    run = f"killed_{dispatch}"
    command = ["bash", SCRIPT, "num_gpus=2", *arguments(run, *PLACED[dispatch])]
    output = workplace.folder / f"{run}.log"
    with (
        output.open("w") as log,
        subprocess.Popen(
            command, cwd=workplace.folder, env=workplace.environment(), stdout=log, stderr=subprocess.STDOUT
        ) as launch,
    ):
        wait_for_steps(workplace.folder / "runs" / run / "metrics.jsonl", 2)
        os.kill(ranks_of(run)[1], signal.SIGKILL)
        assert launch.wait(LIMIT) != 0
    assert "another rank has ended" in output.read_text() or "return code = -9" in output.read_text()
    assert not ranks_of(run)


@pytest.mark.parametrize("dispatch", PLACED)
def test_a_rank_that_fails_alone_ends_the_other(workplace, dispatch):
    run = f"alone_{dispatch}"
    shared = {
        "PYTHONPATH": str(REPOSITORY),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29600 + len(dispatch)),
    }
    command = [sys.executable, "-c", FAILS_ALONE, "train", *arguments(run, *PLACED[dispatch])]
    ranks, logs = [], [workplace.folder / f"{run}-{rank}.log" for rank in range(2)]
    for rank, path in enumerate(logs):
        with path.open("w") as log:
            variables = workplace.environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared)
            ranks.append(subprocess.Popen(command, cwd=workplace.folder, env=variables, stdout=log, stderr=log))
    try:
        assert ranks[1].wait(300) != 0
        assert ranks[0].wait(LIMIT) == 1
    finally:
        for rank in ranks:
            rank.kill()
    assert "the disk is on fire" in logs[1].read_text()
    assert "error: step 3, rank 0: another rank has ended or does not answer" in logs[0].read_text()
