"""`teamlora check`: the checks on facts of machines, and the report."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from tests.cluster.test_probe import GH200, H100, NODES, PIPES, python
from tests.support.minimal_recipe import MINIMAL
from trainer.cli import main
from trainer.cluster import preflight
from trainer.cluster.hostfile import Node
from trainer.cluster.preflight import Report
from trainer.cluster.preflight_checks import run_checks
from trainer.cluster.preflight_facts import ALL, GIB, ClusterFacts, Finding, Need
from trainer.cluster.probe import Facts, Gpu
from trainer.cluster.probe_client import Answer, ClockOffset, Failure
from trainer.recipe import Recipe
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
NEED = Need(device=10 * GIB, host=GIB, disk=GIB)
EXACT = ClockOffset(0.0, 0.1)


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


def grouped(shard_group: str | int, section: str = "base", **more) -> ClusterFacts:
    changed = getattr(RECIPE, section).model_copy(update={"shard_group": shard_group})
    return cluster(recipe=RECIPE.model_copy(update={section: changed}), **more)


@pytest.mark.parametrize("shard_group", ["world", "node", 1, 2])
def test_groups_that_stand_on_one_node_pass(shard_group):
    assert problems(grouped(shard_group)) == []


@pytest.mark.parametrize("section", ["base", "adapter"])
def test_a_group_that_spans_two_nodes_is_a_warning_and_unequal_nodes_an_error(section):
    level, host, what, text = only_problem(grouped(4, section))
    assert (level, host, what) == ("warning", ALL, "shard group")
    told = f"{section}.shard_group=4: a group would span two nodes, so every layer of the {section} crosses the network"
    assert text == told
    unequal = (Node("a", 2), Node("b", 1))
    assert only_problem(grouped("node", section, nodes=unequal))[::3] == (
        "error", f"{section}.shard_group=node, but the nodes have 2, 1 slots",
    )  # fmt: skip


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


def test_gpus_of_unknown_memory_pass():
    assert problems(cluster(second=replace(SECOND, gpus=[GH200] * 2))) == []


def test_another_number_of_nodes_than_in_the_recipe_is_an_error():
    recipe = RECIPE.model_copy(update={"run": RECIPE.run.model_copy(update={"nodes": 3})})
    assert only_problem(cluster(recipe=recipe)) == ("error", ALL, "nodes", "run.nodes=3, but the launch is on 2 nodes")


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
