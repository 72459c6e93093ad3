"""The tests of the other folders: those of one process with the GPU visible, those of several ranks without it."""

import os
import subprocess
import sys

import pytest

from tests.support.workplace import REPOSITORY

LIMIT = 540  # seconds


def run_tests(*arguments: str, **variables: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GPU_TESTS"} | variables
    command = [sys.executable, "-m", "pytest", "-q", "-x", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("folder", ["adapters", "base", "checkpoint", "evaluation", "export", "training"])
def test_a_folder_passes_with_the_gpu_visible(folder):
    run_tests(f"tests/{folder}")


@pytest.mark.parametrize(
    "arguments",
    [["tests/e2e/test_run.py"], ["tests/distributed/test_parity.py", "-k", "2ranks"]],
    ids=["e2e", "parity"],
)
def test_several_ranks_pass_with_the_gpu_hidden(arguments):
    run_tests(*arguments, CUDA_VISIBLE_DEVICES="")
