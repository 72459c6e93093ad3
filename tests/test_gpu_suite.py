"""`bash tests/run.sh gpu` on a machine without a GPU, and the report that it leaves on one with."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.gpu_report import GpuReport
from tests.support.timing import children_seconds

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
def test_without_a_gpu_it_ends_at_once_with_what_it_needs():
    before = children_seconds()
    done = subprocess.run(["bash", "tests/run.sh", "gpu"], cwd=REPOSITORY, capture_output=True, text=True)
    assert children_seconds() - before < 1
    assert done.returncode == 0
    assert "gpu: nothing was run. These tests need an NVIDIA GPU (/dev/nvidia0), its driver" in done.stdout
    assert done.stderr == ""


def test_each_part_is_a_file_that_its_number_finds():
    found = sorted(path.name for path in (REPOSITORY / "tests" / "gpu").glob("test_*.py"))
    assert [name.split("_")[1] for name in found] == list("1234567")


def test_the_report_names_the_machine_what_passed_and_figures(tmp_path):
    results = {"test_1_nf4.py::test_a": "passed", "test_3_training.py::test_b": "failed"}
    report = GpuReport({"card": "NVIDIA L4", "driver": "580.65"}, results, {"peak over estimate": 0.97})
    report.write(tmp_path / "gpu")
    assert json.loads((tmp_path / "gpu" / "report.json").read_text()) == {
        "machine": {"card": "NVIDIA L4", "driver": "580.65"},
        "results": results,
        "figures": {"peak over estimate": 0.97},
    }
    text = (tmp_path / "gpu" / "report.md").read_text()
    assert text.startswith("# Tests on a GPU: 1 of 2 passed\n")
    for line in ("| card | NVIDIA L4 |", "| test_3_training.py::test_b | failed |", "| peak over estimate | 0.97 |"):
        assert line in text
