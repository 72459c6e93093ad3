"""`teamlora check`: the checks on facts of machines, the probe that collects them, and the report."""

import json
import platform
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from tests.support.minimal_recipe import MINIMAL
from trainer.cli import main
from trainer.cluster import preflight
from trainer.cluster.hostfile import Node
from trainer.cluster.preflight import Report
from trainer.cluster.preflight_checks import run_checks
from trainer.cluster.preflight_facts import ALL, GIB, ClusterFacts, Finding, Need
from trainer.cluster.probe import Facts, Gpu, Request, collect_facts, connect, parse_gpus
from trainer.cluster.probe_client import Answer, ClockOffset, Failure, probe_all, probe_this_machine
from trainer.recipe import Recipe
from trainer.run.gpu import visible_gpus
from trainer.run.resources import PACKAGE_ROOT

RECIPE = Recipe.model_validate(yaml.safe_load(MINIMAL))
FIRST = Facts(
    hostname="a",
    machine="boot-a",
    address="198.51.100.2",
    python="3.12.1",
    versions={"torch": "2.13.0", "peft": "0.21.2"},
    code="x",
    cores=16,
    memory=64 * GIB,
    gpus=[Gpu(0, "H100", 80 * GIB, 79 * GIB), Gpu(1, "H100", 80 * GIB, 79 * GIB)],
    recipe=RECIPE.model_dump(mode="json"),
    deepspeed="d",
    base="b",
    base_in_folder=True,
    prepared="p",
    run_directory="/runs",
    disk=100 * GIB,
    port=29600,
)
SECOND = replace(FIRST, hostname="b", machine="boot-b", port=None)
NODES = (Node("a", 2), Node("b", 2))
NEED = Need(device=10 * GIB, host=GIB, disk=GIB)
EXACT = ClockOffset(0.0, 0.1)
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
SMI = """0, GPU-5f01, NVIDIA H100 80GB HBM3, 81559, 81004
1, GPU-5f02, NVIDIA H100 80GB HBM3, 81559, 17
2, GPU-77aa, NVIDIA GH200, [N/A], [N/A]
"""
H100, FULL = (Gpu(i, "NVIDIA H100 80GB HBM3", 81559 * 2**20, mib * 2**20) for i, mib in enumerate((81004, 17)))
GH200 = Gpu(2, "NVIDIA GH200", None, None)


def cluster(first: Facts = FIRST, second: Facts = SECOND, **more) -> ClusterFacts:
    answers = (Answer("a", first, clock=EXACT), Answer("b", second, clock=EXACT))
    return ClusterFacts(**{"recipe": RECIPE, "nodes": NODES, "answers": answers, "need": NEED, **more})


def problems(of: ClusterFacts) -> list[Finding]:
    return [finding for finding in run_checks(of) if finding.level != "ok"]


def only_problem(of: ClusterFacts) -> tuple[str, str, str, str]:
    (finding,) = problems(of)
    assert finding.remedy and "\n" not in finding.text
    return finding.level, finding.host, finding.what, finding.text


def test_equal_machines_pass_and_each_check_says_so_in_one_line():
    found = run_checks(cluster())
    assert {finding.level for finding in found} == {"ok"}
    assert {finding.host for finding in found} == {ALL}
    texts = {finding.what: finding.text for finding in found}
    assert texts["slots"] == "4 ranks on 4 GPUs"
    assert texts["packages"] == "python 3.12.1, torch 2.13.0, peft 0.21.2"
    assert texts["memory"] == "a rank needs 10.00 GiB on its device and 1.00 GiB on its host (estimated)"


OCCUPIED = "a rank needs 10.00 GiB, but GPU 7 has 1.00 GiB of 80.00 GiB free"


def other_rate(value: float) -> dict:
    return RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"learning_rate": value})}).model_dump(
        mode="json"
    )


@pytest.mark.parametrize(
    ("what", "change", "text"),
    [
        ("machine", {"machine": "boot-a", "hostname": "a"}, "is the same machine as a: both are a"),
        ("slots", {"gpus": FIRST.gpus[:1]}, "slots=2, but it has 1 GPU"),
        ("slots", {"gpus": []}, "has no GPU, but a has"),
        ("slots", {"gpus": None, "problems": {"gpus": "nvidia-smi: broken"}}, "its GPUs cannot be used: nvidia-smi: b"),
        ("folder", {"problems": {"folder": "[Errno 2] No such file"}}, "[Errno 2] No such file"),
        ("packages", {"python": "3.11.7"}, "python is 3.11.7, but 3.12.1 on a"),
        ("packages", {"versions": {"torch": "2.13.0", "peft": None}}, "peft is not installed, but 0.21.2 on a"),
        ("code", {"code": "y"}, "has other trainer code than a"),
        ("recipe", {"recipe": other_rate(1e-3)}, "has train.learning_rate=0.001, but a has 0.0002"),
        ("recipe", {"recipe": None, "problems": {"recipe": "unknown key"}}, "unknown key"),
        ("deepspeed", {"deepspeed": "e"}, "deepspeed.config=ds_configs/zero3.json differs from the file on a"),
        ("base", {"base": "c"}, "base.model=base differs from that on a (compared: configuration, tokenizer, tensor n"),
        ("base", {"base": None, "problems": {"base": "no folder"}}, "base.model=base is missing, but a has it"),
        ("prepared", {"prepared": "q"}, "data.prepared_dir=prepared differs from the set on a"),
        ("prepared", {"prepared": None, "problems": {"prepared": "no prepared set"}}, "no prepared set"),
        ("memory", {"gpus": [FIRST.gpus[0], Gpu(7, "H100", 80 * GIB, GIB)]}, OCCUPIED),
        ("memory", {"memory": GIB}, "2 ranks need 2.00 GiB of host memory, but 1.00 GiB is free"),
    ],
)
def test_a_mistake_on_one_node_is_an_error_of_that_node(what, change, text):
    level, host, check, found = only_problem(cluster(second=replace(SECOND, **change)))
    assert (level, host, check) == ("error", "b", what)
    assert found.startswith(text)


@pytest.mark.parametrize(
    ("status", "last_line", "text", "remedy"),
    [
        (255, "ssh: Could not resolve hostname b: Name", "not reached: ssh: Could not", "correct the name"),
        (255, "root@b: Permission denied (publickey).", "not reached: root@b", "ssh-copy-id b"),
        (255, "ssh: connect to host b port 22: No route to host", "not reached: ssh: c", "`ssh b` works without"),
        (1, f"bash: line 1: cd: {PACKAGE_ROOT}/trainer: No such file", "no checkout at", "bash launch/install.sh"),
        (1, "ModuleNotFoundError: No module named 'trainer.cluster'", "no checkout at", "bash launch/install.sh"),
        (127, "bash: line 1: exec: /x/python: not found", f"no interpreter at {sys.executable}", "install.sh"),
        (1, "ModuleNotFoundError: No module named 'pydantic'", f"no interpreter at {sys.executable}", "install.sh"),
        (1, "TypeError: facts()", "the check failed there (TypeError", "the same commit"),
        (None, "", "no answer in time", "see what delays it: ssh b"),
    ],
)
def test_the_reason_why_a_node_does_not_answer_is_reported_with_a_remedy(status, last_line, text, remedy):
    answers = (Answer("a", FIRST, clock=EXACT), Answer("b", failure=Failure(status, last_line)))
    (finding,) = problems(cluster(answers=answers))
    assert (finding.level, finding.host, finding.what) == ("error", "b", "reached")
    assert finding.text.startswith(text) and remedy in finding.remedy


def test_the_majority_is_right_and_the_launching_machine_counts():
    nodes, odd = (*NODES, Node("c", 2)), replace(FIRST, code="y")
    third = Answer("c", replace(SECOND, machine="boot-c"), clock=EXACT)
    of_three = cluster(nodes=nodes, answers=(Answer("a", odd, clock=EXACT), *cluster().answers[1:], third))
    assert only_problem(of_three)[:3] == ("error", "a", "code")
    here = Answer("desk", replace(SECOND, machine="desk", versions={}, gpus=[]))
    assert only_problem(cluster(first=odd, here=here))[:3] == ("error", "a", "code")
    assert problems(cluster(here=here)) == []  # its packages and GPUs do not matter
    assert only_problem(cluster(here=replace(here, facts=replace(here.facts, code="z"))))[:3] == (
        "error",
        "desk",
        "code",
    )


def test_without_any_answer_only_the_reasons_are_reported():
    dead = tuple(Answer(name, failure=Failure(255, "gone")) for name in "ab")
    assert [finding.host for finding in run_checks(cluster(answers=dead))] == ["a", "b"]


def test_failed_connections_wrong_clocks_and_taken_ports_are_reported():
    lost = (Answer("a", FIRST, clock=EXACT), Answer("b", SECOND, clock=EXACT, unreachable="198.51.100.2:1 (no route)"))
    assert only_problem(cluster(answers=lost)) == (
        "error", "b", "connection", "cannot reach a at 198.51.100.2:1 (no route)"
    )  # fmt: skip
    for ahead, uncertainty, text in ((-90, 1, "90 s behind"), (7, 1, "7 s ahead of"), (7, 3, None), (0, 9, None)):
        answers = (Answer("a", FIRST, clock=EXACT), Answer("b", SECOND, clock=ClockOffset(ahead, uncertainty)))
        found = problems(cluster(answers=answers))
        assert [f.text for f in found] == ([f"its clock is {text} this machine's"] if text else [])
    taken = replace(FIRST, problems={"port": "port 1 is taken by x, process 3"})
    assert only_problem(cluster(first=taken)) == ("error", "a", "port", "port 1 is taken by x, process 3")


def test_a_bad_run_directory_is_an_error_on_the_first_node_and_a_warning_elsewhere():
    full = {"disk": GIB // 2}
    assert only_problem(cluster(first=replace(FIRST, **full)))[:3] == ("error", "a", "run directory")
    level, host, _, text = only_problem(cluster(second=replace(SECOND, **full)))
    assert (level, host) == ("warning", "b")
    assert text == "0.50 GiB free at /runs, but the run writes 1.00 GiB"
    shut = {"disk": None, "problems": {"run_directory": "cannot write into /runs (Read-only file system)"}}
    assert only_problem(cluster(first=replace(FIRST, **shut)))[3].endswith(
        "cannot write into /runs (Read-only file system)"
    )


def test_without_gpus_ranks_need_cores_and_host_memory():
    on_cpus = [replace(each, gpus=[], cores=1) for each in (FIRST, SECOND)]
    assert {finding.level for finding in problems(cluster(*on_cpus))} == {"warning"}
    assert only_problem(cluster(replace(on_cpus[0], cores=2), on_cpus[1]))[3] == "slots=2, but it has 1 core and no GPU"
    small = replace(on_cpus[1], cores=2, memory=20 * GIB)
    assert only_problem(cluster(replace(on_cpus[0], cores=2), small))[3].startswith(
        "2 ranks need 22.00 GiB of host memory"
    )


def test_a_hub_base_that_is_not_cached_is_a_warning():
    without = {"base": None, "base_in_folder": False, "problems": {"base": "not fetched"}}
    found = problems(cluster(replace(FIRST, **without), replace(SECOND, **without)))
    assert [(finding.level, finding.host) for finding in found] == [("warning", "a"), ("warning", "b")]


def test_another_number_of_nodes_than_in_the_recipe_is_an_error():
    recipe = RECIPE.model_copy(update={"run": RECIPE.run.model_copy(update={"nodes": 3})})
    assert only_problem(cluster(recipe=recipe)) == ("error", ALL, "nodes", "run.nodes=3, but the launch is on 2 nodes")


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


@pytest.mark.parametrize(("gpus", "device"), [([H100], 2 * GIB), ([], GIB)])
def test_the_estimate_is_for_the_kind_of_device_that_the_nodes_have(tmp_path, monkeypatch, gpus, device):
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    on = {"cpu": {"device": GIB, "host": 0}, "cuda": {"device": 2 * GIB, "host": 0}}
    printed = json.dumps({"trained_parameters": 1, "peak": on["cpu"], "peak_on": on})
    monkeypatch.setattr(
        preflight, "_started_estimate", lambda *_: subprocess.Popen(python(f"print('{printed}')"), **PIPES)
    )
    facts = replace(FIRST, gpus=gpus)
    monkeypatch.setattr(preflight, "probe_this_machine", lambda host, *_: Answer(host, facts, clock=EXACT))
    texts = {found.what: found.text for found in preflight.check_launch(tmp_path / "recipe.yaml", (), None).findings}
    assert texts["memory"].startswith(f"a rank needs {device / GIB:.2f} GiB on its device and ")


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


def test_gpus_of_unknown_memory_pass():
    assert problems(cluster(second=replace(SECOND, gpus=[GH200] * 2))) == []


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


def test_the_table_has_one_line_per_finding_and_ends_with_the_errors():
    found = (
        Finding("error", "node-b", "code", "has other code", "bring it to the same commit"),
        Finding("ok", ALL, "recipe", "the same"),
        Finding("warning", "node-a", "clock", "is ahead", "set it"),
    )
    lines = str(Report(found, NODES, 1.23)).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["ok", "warning", "error"]
    assert lines[3].split(maxsplit=3)[1:] == ["node-b", "code", "has other code; bring it to the same commit"]
    assert lines[-1] == "2 nodes in 1.2 s: 1 error, 1 warning"


@pytest.fixture
def reported(monkeypatch, tmp_path):
    """Runs the command with a report of these findings; returns its status and the arguments of check_launch."""

    def run(*arguments: str, found: tuple[Finding, ...] = ()) -> tuple[int, list]:
        passed = []

        def check_launch(*given):
            passed.extend(given)
            return Report(found, NODES, 1.0)

        monkeypatch.setattr(preflight, "check_launch", check_launch)
        return main(["check", *arguments]), passed

    return run


def test_errors_give_status_2_and_one_line_on_stderr(reported, capsys):
    error = Finding("error", "a", "code", "has other code", "bring it")
    status, _ = reported("recipe.yaml", "--json", found=(error,))
    out, err = capsys.readouterr()
    assert status == 2
    assert err == "error: the check found 1 error; fix what it reports on stdout\n"
    assert json.loads(out)["findings"] == [
        {"level": "error", "host": "a", "what": "code", "text": "has other code", "remedy": "bring it"}
    ]
    assert reported("recipe.yaml", found=(replace(error, level="warning"),))[0] == 0


def test_the_command_passes_its_arguments_on(reported, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    _, passed = reported("r.yaml", "--hostfile", str(hosts), "train.steps=1", "--master-port", "29600", "--limit", "9")
    assert [str(passed[0]), *passed[1:]] == ["r.yaml", ["train.steps=1"], NODES, 29600, 9]


def test_a_missing_hostfile_is_an_error(tmp_path, capsys):
    assert main(["check", "recipe.yaml", "--hostfile", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: hostfile=")
