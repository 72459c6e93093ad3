"""What the probe finds out on a machine, and how it is asked."""

import platform
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.minimal_recipe import MINIMAL
from trainer.cluster import preflight
from trainer.cluster.hostfile import Node
from trainer.cluster.probe import Gpu, Request, collect_facts, connect, parse_gpus
from trainer.cluster.probe_client import Answer, Failure, probe_all, probe_this_machine
from trainer.run.gpu import visible_gpus
from trainer.run.resources import PACKAGE_ROOT

NODES = (Node("a", 2), Node("b", 2))
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
SMI = """0, GPU-5f01, NVIDIA H100 80GB HBM3, 81559, 81004
1, GPU-5f02, NVIDIA H100 80GB HBM3, 81559, 17
2, GPU-77aa, NVIDIA GH200, [N/A], [N/A]
"""
H100, FULL = (Gpu(i, "NVIDIA H100 80GB HBM3", 81559 * 2**20, mib * 2**20) for i, mib in enumerate((81004, 17)))
GH200 = Gpu(2, "NVIDIA GH200", None, None)


def test_the_probe_reports_what_it_finds_and_why_something_is_missing(tmp_path):
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    answer = probe_this_machine(
        "here", Request(str(tmp_path), "recipe.yaml", ("train.steps=7", "deepspeed.config=own.json"), port=0), limit=60
    )
    found = answer.facts
    assert found.recipe["train"]["steps"] == 7
    assert set(found.problems) == {"base", "prepared", "deepspeed"}
    assert found.problems["deepspeed"].startswith("deepspeed.config=own.json: No such file")
    assert found.problems["prepared"].startswith("data.prepared_dir: no prepared set in prepared")
    assert (found.python, found.run_directory) == (platform.python_version(), str(tmp_path))
    assert abs(answer.clock.ahead) < 1 + answer.clock.uncertainty


def test_the_probe_uses_the_variables_of_ranks_but_downloads_nothing(tmp_path):
    cached = tmp_path / "hf" / "hub" / "models--some--base"
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "snapshots" / "1" / "config.json").write_text("{}")
    save_file({"a": np.zeros(1)}, cached / "snapshots" / "1" / "model.safetensors")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    given = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    there, absent = (
        probe_this_machine(
            "here", Request(str(tmp_path), "recipe.yaml", (f"base.model={name}",), environment=given), limit=60
        )
        for name in ("some/base", "some/other")
    )
    assert there.facts.base is not None and not there.facts.base_in_folder
    assert "outgoing traffic has been disabled" in absent.facts.problems["base"]


@pytest.mark.parametrize("over_ssh", [True, False])
def test_nodes_get_the_variables_of_their_ranks_and_this_machine_keeps_its_own(tmp_path, monkeypatch, over_ssh):
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    (tmp_path / ".deepspeed_env").write_text("HF_HOME=/shared/hf\nCUDA_VISIBLE_DEVICES=3\n")
    monkeypatch.chdir(tmp_path)
    requests = {}

    def probe(hosts, request, _limit):
        requests[request.port is None] = request
        return [Answer(host, failure=Failure(255, "gone")) for host in hosts]

    monkeypatch.setattr(preflight, "probe_hosts", probe)
    monkeypatch.setattr(preflight, "probe_this_machine", lambda host, *more: probe([host], *more)[0])
    preflight.check_launch(tmp_path / "recipe.yaml", (), NODES if over_ssh else None)
    assert requests[False].environment.get("HF_HOME") == ("/shared/hf" if over_ssh else None)
    assert "CUDA_VISIBLE_DEVICES" not in requests[False].environment  # set from the slots
    assert not over_ssh or requests[True].environment == {}


def test_a_taken_port_is_reported_with_its_owner_and_another_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # restores the folder: the probe changes it for good
    first = collect_facts(Request(str(tmp_path), "none.yaml", (), port=0))
    assert connect("127.0.0.1", first.port, first.hostname) is None
    assert connect("127.0.0.1", first.port, "another") == f"{first.hostname} answers there"
    second = collect_facts(Request(str(tmp_path), "none.yaml", (), port=first.port))
    assert second.problems["port"].startswith(f"port {first.port} is taken")
    assert connect("127.0.0.1", second.port, first.hostname) is None


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [H100, FULL, GH200]),
        ("2,0", [GH200, H100]),
        ("GPU-77aa,1", [GH200, FULL]),
        ("GPU-5f02,GPU-7", [FULL, GH200]),
        ("MIG-9b,0", [Gpu(None, "MIG-9b", None, None), H100]),
        ("1,-1,0", [FULL]),
        ("-1", []),
        ("", []),
    ],
)
def test_gpus_are_the_visible_ones_of_nvidia_smi(monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert parse_gpus(SMI, visible_gpus()) == expected


def test_a_visible_gpu_that_nvidia_smi_does_not_list_is_an_error():
    with pytest.raises(OSError, match="CUDA_VISIBLE_DEVICES names 3, but nvidia-smi lists no such GPU"):
        parse_gpus(SMI, [0, 3])


def test_the_probe_imports_nothing_heavy():
    program = "import sys, trainer.cluster.probe, trainer.base.base_fingerprint, data_prep.reader; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE_ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets", "pyarrow"} & set(done.stdout.split())


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_shells_greeting_is_ignored_and_the_last_line_of_a_failure_is_kept(tmp_path):
    here = f"{sys.executable} -m trainer.cluster.probe"
    greets = ["sh", "-c", f"echo welcome; echo '[1]'; exec {here}"]
    fails = python("import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)")
    found = probe_all({"a": greets, "b": fails}, Request(str(tmp_path), "none.yaml", (), port=0), limit=60)
    assert found[0].facts is not None
    assert found[1].failure == Failure(3, "two")


def test_a_silent_machine_is_given_up_without_delaying_other_answers(tmp_path):
    started = time.monotonic()
    hangs, answers = python("import time; time.sleep(600)"), [sys.executable, "-m", "trainer.cluster.probe"]
    found = probe_all({"a": hangs, "b": answers}, Request(str(tmp_path), "none.yaml", (), port=0), limit=5)
    assert time.monotonic() - started < 300
    assert found[0].failure == Failure(None, "")
    assert found[1].facts is not None and found[1].unreachable is None
