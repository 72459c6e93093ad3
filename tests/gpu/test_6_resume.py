"""run.deterministic on the GPU: a run repeated, and one that was stopped and resumed, publish the same bits."""

import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from tests.support.workplace import Workplace, make_workplace, wait_for_steps

OPTIONS = ["recipe.yaml", "run.deterministic=true", "base.dtype=bf16", "train.steps=200"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    workplace = make_workplace(tmp_path_factory.mktemp("resume"))
    assert workplace.teamlora("prepare", "recipe.yaml").returncode == 0
    return workplace


def adapter(workplace: Workplace, run: str) -> dict[str, torch.Tensor]:
    return load_file(workplace.folder / "runs" / run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def unbroken(workplace) -> dict[str, torch.Tensor]:
    done = workplace.teamlora("train", *OPTIONS, "run.name=unbroken")
    assert done.returncode == 0, done.stderr
    return adapter(workplace, "unbroken")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def test_a_repeated_run_has_the_same_bits(workplace, unbroken):
    assert workplace.teamlora("train", *OPTIONS, "run.name=again").returncode == 0
    assert_equal(adapter(workplace, "again"), unbroken)


def test_a_run_that_a_signal_stopped_resumes_to_the_same_bits(workplace, unbroken):
    command = ["teamlora", "train", *OPTIONS, "run.name=stopped"]
    with subprocess.Popen(command, cwd=workplace.folder, env=workplace.environment()) as run:
        wait_for_steps(workplace.folder / "runs" / "stopped" / "metrics.jsonl", 20)
        run.send_signal(signal.SIGTERM)
    assert run.returncode == 75
    assert len(workplace.records("stopped")) < 200
    assert workplace.run(*command).returncode == 0
    assert_equal(adapter(workplace, "stopped"), unbroken)
