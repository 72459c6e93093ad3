"""`teamlora check` without a hostfile: this machine alone."""

import json
import socket

import pytest

from trainer.run.launch_protocol import MISTAKE

pytestmark = pytest.mark.slow

PATIENT = ("--limit", "100")  # a busy machine takes its time to import torch, for the estimate


def test_this_machine_passes_the_same_checks(workplace):
    done = workplace.teamlora("check", "recipe.yaml", "--json", *PATIENT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] and report["nodes"] == [{"name": socket.gethostname(), "slots": 1}]
    whats = {finding["what"] for finding in report["findings"]}
    assert {"packages", "code", "recipe", "base", "prepared", "run directory", "port", "memory"} <= whats


def test_mistakes_give_a_table_and_status_2(workplace):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        done = workplace.teamlora("check", "recipe.yaml", "data.seed=3", "--master-port", str(port))
    assert done.returncode == MISTAKE
    assert done.stderr == "error: the check found 2 errors; fix what it reports on stdout\n"
    errors = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert [line.split()[2] for line in errors] == ["prepared", "port"]
    assert "data.seed: the recipe says 3, but prepared was prepared with 0" in errors[0]


def test_what_every_rank_would_refuse_is_an_error(workplace):
    done = workplace.teamlora("check", "recipe.yaml", "train.micro_batch_size=3", *PATIENT)
    assert done.returncode == MISTAKE
    assert "train.global_batch_size=4 is not divisible by train.micro_batch_size=3" in done.stdout
