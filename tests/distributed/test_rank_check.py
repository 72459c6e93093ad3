"""What ranks compare before they load anything: whatever differs is told with rank, host, both values and a remedy."""

from dataclasses import replace

import pytest
import torch

from data_prep.user_error import UserError
from trainer.distributed.rank_check import RankFacts, check_ranks_agree, describe, interface, own_facts
from trainer.run.launch_protocol import LAUNCH_ID

RECIPE = {"run": {"name": "a", "seed": 0}, "train": {"steps": 10}}
VERSIONS = {"python": "3.12.1", "torch": "2.13.0", "deepspeed": "0.19.8"}
FIRST = RankFacts("a", "a's boot", 0, "one", VERSIONS, ("x", "y"), RECIPE, "CPU")
SECOND = replace(FIRST, host="b", machine="b's boot")


def refusal(*ranks: RankFacts, nodes: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check_ranks_agree(ranks, nodes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ranks_that_differ_in_their_place_only_agree():
    check_ranks_agree([FIRST, replace(FIRST, local_rank=1), SECOND], nodes=2)
    check_ranks_agree([FIRST], nodes=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"launch": "two"}, "belongs to another launch than rank 0 on a: one of them was left behind"),
        ({"launch": None}, "belongs to another launch than rank 0 on a: one of them was left behind"),
        ({"versions": {**FIRST.versions, "torch": "2.12.0"}}, "has torch 2.12.0, rank 0 on a has 2.13.0; install"),
        ({"versions": {**FIRST.versions, "python": "3.11.7"}}, "has python 3.11.7, rank 0 on a has 3.12.1; install"),
        (
            {"code": ("x", "z")},
            "runs other code of this trainer than rank 0 on a; check out the same commit on every node",
        ),
        ({"recipe": {**RECIPE, "train": {"steps": 11}}}, "has train.steps=11, rank 0 on a has 10; give every node"),
    ],
    ids=["launch", "no launch", "package", "interpreter", "code", "recipe"],
)
def test_what_differs_is_named_with_rank_host_and_both_values(change, message):
    assert refusal(FIRST, FIRST, replace(SECOND, **change)).startswith(f"rank 2 on b {message}")


@pytest.mark.parametrize(("nodes", "found"), [(2, "1: a (2)"), (1, "2: a (1), b (1)")])
def test_another_number_of_nodes_than_the_recipe_says_is_refused(nodes, found):
    ranks = [FIRST, FIRST] if nodes == 2 else [FIRST, SECOND]
    message = refusal(*ranks, nodes=nodes)
    assert message.startswith(f"run.nodes={nodes}, and the ranks are on {found}; give the launcher an")


def test_machines_of_one_name_are_as_many_nodes():
    clone = replace(FIRST, machine="another boot")
    check_ranks_agree([FIRST, clone], nodes=2)
    assert "the ranks are on 2: a (1), a (1); " in refusal(FIRST, clone, nodes=1)


def test_facts_of_this_process_agree_with_themselves_and_follow_the_launch(monkeypatch):
    class Recipe:
        def model_dump(self, mode: str) -> dict:
            return RECIPE

    monkeypatch.setenv(LAUNCH_ID, "one")
    facts = own_facts(Recipe(), torch.device("cpu"))
    monkeypatch.setenv(LAUNCH_ID, "two")
    check_ranks_agree([facts, facts], nodes=1)
    assert "another launch" in refusal(facts, own_facts(Recipe(), torch.device("cpu")))


def test_the_line_for_a_person_tells_nodes_versions_and_time():
    line = describe([FIRST, FIRST, replace(SECOND, device="NVIDIA L4")], 1.26)
    assert line.startswith("ranks           3 on 2 nodes: a (2), b (1); on CPU and NVIDIA L4; ")
    assert line.endswith("; met in 1.3 s; python 3.12.1, torch 2.13.0, deepspeed 0.19.8")


def test_the_interface_is_the_one_that_reaches_the_first_rank(monkeypatch):
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert interface() == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert interface() == "eth7"
