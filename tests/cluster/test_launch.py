"""What a launch is told: hostfile, variables, options; and what it tells of its ranks' endings."""

import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from data_prep.user_error import UserError
from tests.support.minimal_recipe import MINIMAL
from trainer.cluster.hostfile import Node, read_hostfile
from trainer.cluster.launch_environment import forwarded_variables
from trainer.cluster.launch_options import parse_launch_options
from trainer.cluster.launch_outcome import KILLED, Outcome, RankEnding, outcome
from trainer.cluster.local_ranks import slots_here
from trainer.cluster.ssh import launch_folder
from trainer.cluster.supervisor import Launch, dividing_nodes, launch
from trainer.distributed import network
from trainer.recipe import Recipe
from trainer.run.launch_protocol import (
    ENDINGS,
    FAULT,
    LAUNCH_ID,
    MISTAKE,
    STOPPED,
    Ending,
    launch_of,
    read_endings,
    write_ending,
)

REPOSITORY = Path(__file__).parent.parent.parent


def test_a_hostfile_is_read_in_its_order(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# the cluster\nnode-b slots=2\n\n  node-a   slots=8  # the old one\n")
    assert read_hostfile(path) == (Node("node-b", 2), Node("node-a", 8))


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfNode-B slots=2\r\nnode-a slots=8\r\n",
        b"Node-B Slots=2\nnode-a SLOTS=8",
        b"Node-B slots = 2\nnode-a slots= 8 \n",
        b"Node-B slots=2 max_slots=4\nnode-a max-slots=8 slots=8\n",
        b"\n \t\n# all\nNode-B\tslots=2# the first\n\tnode-a\t slots=8\n",
    ],
    ids=["BOM and CRLF", "capitals", "spaces", "max_slots", "tabs"],
)
def test_hostfiles_of_other_tools_and_editors_are_read(tmp_path, text):
    """Names keep their case."""
    path = tmp_path / "hosts"
    path.write_bytes(text)
    assert read_hostfile(path) == (Node("Node-B", 2), Node("node-a", 8))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("node-a\n", "line 1: 'node-a': expected `name slots=N`"),
        ("node-a slots=0\n", "line 1: 'node-a slots=0': expected"),
        ("node-a slots=" + "9" * 5000, "line 1: 'node-a slots=9999"),
        ("node-a, slots=8\n", "line 1: 'node-a, slots=8': expected"),
        ("\0 slots=8\n", "line 1: '\\x00 slots=8': expected"),
        ("node-a slots=2\n\nnode-a slots=2\n", "line 3: node-a is listed twice, on line 1 too; use one line with"),
        ("node-a slots=2\nNode-A slots=2\n", "line 2: Node-A is listed twice, on line 1 too"),
        ("node-a slots=2 slots=3\n", "line 1: 'node-a slots=2 slots=3': expected"),
        ("node-a slots=2 gpus=3\n", "line 1: 'node-a slots=2 gpus=3': expected"),
        ("node-a slots=8 max_slots=4\n", "line 1: 'node-a slots=8 max_slots=4': expected"),
        ("node-a slots=-1\n", "line 1: 'node-a slots=-1': expected"),
        ("node-a:8\n", "line 1: 'node-a:8': expected"),
        ("-F/tmp/conf slots=1\n", "line 1: '-F/tmp/conf slots=1': expected"),  # to ssh that is an option
        ("# nothing\n", "lists no nodes"),
        (None, "No such file or directory; give a file with one line per node, such as `node-a slots=8`"),
    ],
)
def test_a_bad_hostfile_is_refused(tmp_path, text, told):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as refusal:
        read_hostfile(path)
    assert str(refusal.value).startswith(f"hostfile={path}")
    assert told in str(refusal.value)


def test_threads_interface_and_proxy_are_passed_on_and_the_shell_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text('NCCL_SOCKET_IFNAME=ib0\nMY_TOKEN="two words"\n')
    shell = {
        "OMP_NUM_THREADS": "8",
        "NCCL_SOCKET_IFNAME": "eth0",
        "HTTPS_PROXY": "http://proxy:3128",
        "no_proxy": "localhost",
        "CUDA_VISIBLE_DEVICES": "0",
        "SSH_CONNECTION": "here",
        "HOME": "/root",
    }
    assert forwarded_variables(shell, tmp_path) == {
        "OMP_NUM_THREADS": "8",
        "NCCL_SOCKET_IFNAME": "ib0",
        "HTTPS_PROXY": "http://proxy:3128",
        "no_proxy": "localhost",
        "MY_TOKEN": "two words",
    }


@pytest.mark.parametrize("line", ["", "# threads", "OMP_NUM_THREADS", "=8"])
def test_a_line_of_deepspeed_env_that_would_end_its_launcher_is_refused(tmp_path, monkeypatch, line):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text(f"A=1\n{line}\nB=2\n")
    with pytest.raises(UserError, match=r"deepspeed_env, line 2: .*expected NAME=VALUE"):
        forwarded_variables({}, tmp_path)


@pytest.mark.parametrize("visible", ["", "-1", "-1,0"])
def test_ranks_on_cpus_are_shown_no_gpu_where_none_is_visible(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert slots_here(None) == [-1]
    assert slots_here(2) == [-1, -1]


def test_devices_are_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5f,7")
    assert slots_here(None) == [2, "GPU-5f", 7]
    assert slots_here(2) == [2, "GPU-5f"]
    with pytest.raises(UserError, match="num_gpus=4: this machine has 3"):
        slots_here(4)


def test_options_of_the_launch_are_separated_from_values_of_the_recipe():
    found = parse_launch_options(["hostfile=hf", "my.yaml", "min_nodes=1", "retries=2", "check=false", "train.steps=3"])
    assert found.arguments == ("my.yaml", "train.steps=3")
    assert (found.hostfile, found.min_nodes, found.retries, found.check) == (Path("hf"), 1, 2, False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["num_gpus=two"], "num_gpus=two: expected a whole number of at least 1"),
        (["retries=-1"], "retries=-1: expected a whole number of at least 0"),
        (["num_gpus=0"], "num_gpus=0: expected a whole number of at least 1"),
        (["check=yes"], "check=yes: expected true or false"),
        (["hostfile=hf", "num_gpus=2"], "num_gpus=2: expected the hostfile's slots alone; remove num_gpus"),
        (["min_nodes=1"], "min_nodes=1: expected hostfile=FILE with it"),
        (["master_port=70000"], "master_port=70000: expected a whole number from 1 to 65535"),
    ],
)
def test_bad_options_of_a_launch_are_refused(arguments, told):
    with pytest.raises(UserError, match=told):
        parse_launch_options(arguments)


@pytest.mark.parametrize("words", [["retries=1"], ["one.yaml", "two.yaml"]])
def test_a_launch_without_exactly_one_recipe_is_refused(words):
    with pytest.raises(UserError, match="expected the path of one recipe; see `teamlora recipes`"):
        launch(words)


def test_a_launch_under_a_launcher_is_refused_since_each_rank_would_launch_again(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"RANK=0: expected no launcher .*use `teamlora train`"):
        launch(["my.yaml"])


@pytest.mark.parametrize(
    ("answering", "least", "batch", "experts", "expected"),
    [
        (8, 1, 128, 1, 8),
        (7, 1, 128, 1, 4),
        (7, 5, 128, 1, 7),
        (3, 2, 128, 1, 2),
        (6, 1, 96, 1, 6),
        (1, 1, 128, 1, 1),
        (3, 1, 96, 16, 2),
        (3, 1, 96, 8, 3),
        (3, 3, 96, 16, 3),
    ],
)
def test_of_the_nodes_that_answer_as_many_are_taken_as_batch_and_experts_can_be_cut_for(
    answering, least, batch, experts, expected
):
    """Nodes of 8 ranks, micro-batches of 2; none of 5 to 7 nodes divides 128, so all 7 come, and the ranks refuse."""
    recipe = Recipe.model_validate(
        yaml.safe_load(MINIMAL)
        | {
            "train": {"steps": 1, "global_batch_size": batch, "micro_batch_size": 2},
            "adapter": {"num_experts": 16},
            "experts": {"parallel_size": experts, "across_nodes": experts > 1},
        }
    )
    nodes = [Node(f"node-{number}", 8) for number in range(answering)]
    assert dividing_nodes(nodes, least, recipe) == expected


@pytest.mark.parametrize("section", ["base", "adapter"])
def test_of_the_nodes_that_answer_as_many_are_taken_as_groups_that_share_a_copy_can_be_made_of(section):
    recipe = Recipe.model_validate(yaml.safe_load(MINIMAL) | {"train": {"steps": 1, "global_batch_size": 96}})
    sizes = {}
    for group in ("world", "node", 8, 16):
        changed = getattr(recipe, section).model_copy(update={"shard_group": group})
        sizes[group] = dividing_nodes(
            [Node(f"node-{n}", 8) for n in range(3)], 1, recipe.model_copy(update={section: changed})
        )
    assert sizes == {"world": 3, "node": 3, 8: 3, 16: 2}


def test_a_link_on_the_way_to_the_checkout_stays_in_what_nodes_are_told(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(REPOSITORY)
    program = f"import sys; sys.path.insert(0, '{link}'); from trainer.cluster import supervisor as s; print(s.PROGRAM)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{link}/trainer/__main__.py"


@pytest.mark.parametrize(("told", "expected"), [("link", "link"), ("elsewhere", "real"), ("none", "real")])
def test_the_folder_of_a_launch_is_named_as_in_the_shell(tmp_path, monkeypatch, told, expected):
    for name in ("real", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "link")
    monkeypatch.setenv("PWD", str(tmp_path / told))
    assert launch_folder() == tmp_path / expected


@pytest.mark.parametrize(
    ("ssh", "outward", "interfaces", "expected"),
    [
        ("10.0.0.9 1 10.0.0.2 22", "10.1.0.2", ["127.0.0.1"], "10.0.0.2"),
        ("127.0.0.1 1 127.0.1.1 22", "10.1.0.2", ["127.0.0.1", "172.17.0.1", "10.1.0.2"], "10.1.0.2"),
        (None, None, ["127.0.0.1", "169.254.3.1", "10.1.0.2"], "10.1.0.2"),
        (None, None, ["127.0.0.1", "169.254.3.1"], "169.254.3.1"),
        (None, None, ["127.0.0.1"], "127.0.0.1"),
    ],
)
def test_a_machine_is_reached_where_ssh_reached_it_or_where_it_goes_out(
    monkeypatch, ssh, outward, interfaces, expected
):
    monkeypatch.setenv("SSH_CONNECTION", ssh or "")
    found = [SimpleNamespace(family=socket.AF_INET, address=address) for address in interfaces]
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: {"all": found})
    monkeypatch.setattr(network, "_address_towards", lambda _: outward)
    assert network.reached_at() == expected


def ended(rank: int, status: int, line: str = "", followed: bool = False, stuck: bool = False) -> RankEnding:
    return RankEnding(rank, Ending(status, line, followed), stuck)


LOST = ended(0, FAULT, "another rank has ended", followed=True)
HALTED = ended(1, FAULT, "was halted", stuck=True)
OWN = ended(2, FAULT, "ValueError: no")
GONE = ended(1, FAULT, KILLED)


@pytest.mark.parametrize(
    ("ranks", "launchers", "stopping", "expected"),
    [
        ([ended(0, 0), ended(1, 0)], [0, 0], False, Outcome(0)),
        ([ended(0, 0), ended(1, 0)], [1], False, Outcome(0)),
        ([ended(0, 0), ended(1, 0)], [-9], False, Outcome(0)),
        ([ended(0, 0), ended(1, 0)], [1], True, Outcome(0)),
        ([ended(0, STOPPED), ended(1, STOPPED)], [1], False, Outcome(STOPPED)),
        ([ended(1, MISTAKE), ended(0, FAULT, "x")], [1], False, Outcome(MISTAKE)),
        ([LOST, HALTED], [1], False, Outcome(FAULT, "node, rank 1: was halted")),
        ([LOST, HALTED, OWN], [1], False, Outcome(FAULT, "node, rank 2: ValueError: no")),
        ([LOST], [1], False, Outcome(FAULT, "node, rank 0: another rank has ended")),
        ([LOST], [1], True, Outcome(STOPPED, "node, rank 0: another rank has ended")),
        ([LOST, GONE], [256 - signal.SIGKILL], False, Outcome(FAULT, f"node, rank 1: {KILLED}")),
        ([LOST, GONE], [1], False, Outcome(FAULT, f"node, rank 1: {KILLED}")),
        (
            [LOST, GONE],
            [256 - signal.SIGBUS],
            False,
            Outcome(
                FAULT,
                "node, rank 1: ended by SIGBUS: a file of the base or the prepared set could not be read, or was cut "
                "meanwhile",
            ),
        ),
        ([], [2], False, Outcome(MISTAKE)),
        (
            [],
            [-9],
            False,
            Outcome(FAULT, "DeepSpeed's launcher: killed from outside (SIGKILL)"),
        ),
        (
            [ended(0, STOPPED), ended(1, STOPPED)],
            [-9],
            False,
            Outcome(FAULT, "DeepSpeed's launcher: killed from outside (SIGKILL)"),
        ),
        ([ended(0, STOPPED)], [-9], True, Outcome(STOPPED)),
        ([OWN, LOST], [1], True, Outcome(FAULT, "node, rank 2: ValueError: no")),
        ([HALTED], [1], True, Outcome(STOPPED, "node, rank 1: was halted")),
        ([], [1], True, Outcome(STOPPED)),
    ],
)
def test_the_outcome_names_the_first_cause(ranks, launchers, stopping, expected):
    assert outcome([("node, ", found) for found in ranks], launchers, stopping) == expected


def test_a_rank_leaves_its_ending_for_its_launcher(tmp_path, monkeypatch):
    monkeypatch.delenv(ENDINGS, raising=False)
    write_ending(Ending(0))
    monkeypatch.setenv(ENDINGS, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    write_ending(Ending(FAULT, "the disk is full"))
    assert read_endings(tmp_path) == {3: Ending(FAULT, "the disk is full")}


def test_starts_of_one_launch_share_its_name_and_differ_in_their_own():
    recipe = Recipe.model_validate(yaml.safe_load(MINIMAL))
    first = Launch(parse_launch_options(["my.yaml"]), recipe, ())
    ids = [each._own_variables()[LAUNCH_ID] for each in (first, replace(first, again=True), replace(first, again=True))]
    assert len(set(ids)) == 3
    assert len({launch_of(each) for each in ids}) == 1
    other = Launch(parse_launch_options(["my.yaml"]), recipe, ())
    assert launch_of(other._own_variables()[LAUNCH_ID]) != launch_of(ids[0])
    assert launch_of("4711.2.0") == launch_of("4711.0.1") == "4711", "a Slurm job, its restarts, its starts"
    assert launch_of(None) is None and launch_of("") is None
