"""What ranks, nodes and DeepSpeed's configuration must be for a placement and for groups that share a base."""

from pathlib import Path

import pytest

from data_prep.user_error import UserError
from trainer.distributed.rank_groups import base_shard_group, check_expert_parallel, crosses_nodes
from trainer.recipe import BaseModelConfig, ExpertsConfig

ZERO3 = {"zero_optimization": {"stage": 3}}
PATH = Path("ds_configs/some.json")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_placement_needs_zero_3_and_says_why(stage):
    config = {"zero_optimization": {"stage": stage}}
    with pytest.raises(UserError, match=rf"some\.json has ZeRO stage {stage}, .* every parameter whole on every rank"):
        check_expert_parallel(ExpertsConfig(parallel_size=2), [0, 1], config, PATH)


def test_size_must_divide_the_ranks():
    with pytest.raises(UserError, match=r"experts\.parallel_size=4 does not divide the 6 ranks"):
        check_expert_parallel(ExpertsConfig(parallel_size=4), [0, 1, 2, 3, 4, 5], ZERO3, PATH)


@pytest.mark.parametrize("local_ranks", [[0, 1, 0, 1], [0, 0, 0, 0]], ids=["two nodes of two", "four of one"])
def test_a_group_stands_on_one_node_unless_the_recipe_says_otherwise(local_ranks):
    with pytest.raises(UserError, match="would span two nodes"):
        check_expert_parallel(ExpertsConfig(parallel_size=4), local_ranks, ZERO3, PATH)
    check_expert_parallel(ExpertsConfig(parallel_size=4, across_nodes=True), local_ranks, ZERO3, PATH)


def test_what_fits_passes():
    check_expert_parallel(ExpertsConfig(parallel_size=2), [0, 1, 2, 3, 0, 1, 2, 3], ZERO3, PATH)
    check_expert_parallel(ExpertsConfig(), [0], {"zero_optimization": {"stage": 0}}, PATH)


def grouped(shard_group: str | int, local_ranks: list[int], stage: int = 3) -> int:
    base = BaseModelConfig(model="base", shard_group=shard_group)
    return base_shard_group(base, local_ranks, {"zero_optimization": {"stage": stage}}, PATH)


@pytest.mark.parametrize(
    ("shard_group", "local_ranks", "size"),
    [
        ("world", [0, 1, 2, 0, 1], 5),
        ("node", [0, 1, 2, 0, 1, 2], 3),
        ("node", [0, 1, 2, 3], 4),
        ("node", [0, 0, 0], 1),
        (2, [0, 1, 2, 3, 0, 1, 2, 3], 2),
        (8, [0, 1, 2, 3, 0, 1, 2, 3], 8),
        (1, [0, 1, 2], 1),
    ],
)
def test_ranks_of_a_group_that_shares_a_base(shard_group, local_ranks, size):
    assert grouped(shard_group, local_ranks) == size


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_stages_keep_the_base_whole_and_say_so(stage):
    assert grouped("world", [0, 1], stage) == grouped(1, [0, 1], stage) == 1
    with pytest.raises(
        UserError, match=rf"base\.shard_group=node: .*some\.json has ZeRO stage {stage}, .*base and adapter whole"
    ):
        grouped("node", [0, 1], stage)


def test_groups_that_do_not_divide_the_ranks_are_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"base\.shard_group=4 does not divide the 6 ranks of this run"):
        grouped(4, [0, 1, 2, 3, 4, 5])
    with pytest.raises(UserError, match=r"the nodes have 2 and 3 ranks; give every node as many, or .* divides 5$"):
        grouped("node", [0, 1, 0, 1, 2])


def test_a_group_crosses_nodes_where_its_ranks_are_not_neighbours_on_one():
    assert [crosses_nodes(size, [0, 1, 2, 3, 0, 1, 2, 3]) for size in (1, 2, 4, 8)] == [False, False, False, True]
    assert crosses_nodes(2, [0, 1, 2, 0, 1, 2])
