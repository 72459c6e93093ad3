"""Device correctness without a GPU: everything that trains or decodes, on a device that computes nothing.

The cases run together in one process (tests/gpu_correctness/cases.py), whose imports take longer than they do.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

METHODS = ["teamlora", "renormalized", "moelora", "hydralora", "lora"]
WHOLE = [
    *(f"{what}-{method}" for method in METHODS for what in ("train", "decode")),
    "train-checkpointed",
    "train-loss-chunks",
    "train-varlen",
    "decode-packed",
    "nf4-linear",
    "place-weights",
    "place-weights-moelora",
    "place-tokens",
    "choose-dispatch",
    "optimizer-step",
]
FAULTS = {
    "fault-tensor-on-the-cpu": "found at least two devices, fakegpu:0 and cpu",
    "fault-tensor-on-the-cpu-in-backward": "found at least two devices, fakegpu:0 and cpu",
    "fault-waits-in-backward": "AssertionError: {'fused.py",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str | None]:
    """{case: None, or its traceback}"""
    file = tmp_path_factory.mktemp("fake_gpu") / "outcomes.json"
    command = [sys.executable, "-m", "tests.gpu_correctness.cases", str(file)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", WHOLE)
def test_every_tensor_is_on_the_gpu_and_no_forward_or_backward_waits_for_it(outcomes, case):
    assert outcomes[case] is None, outcomes[case]


@pytest.mark.parametrize("case", FAULTS)
def test_a_deliberate_fault_is_found(outcomes, case):
    assert FAULTS[case] in (outcomes[case] or "")


def test_every_case_is_looked_at(outcomes):
    assert outcomes.keys() == {*WHOLE, *FAULTS}
