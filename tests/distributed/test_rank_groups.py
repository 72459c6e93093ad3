"""What ranks, nodes and DeepSpeed's configuration must be for a placement and for groups that share a base."""

from pathlib import Path

import pytest

from data_prep.user_error import UserError
from tests.support import scene
from trainer.distributed.rank_groups import (
    ShardGroups,
    base_shard_group,
    check_expert_parallel,
    crosses_nodes,
    shard_groups,
)
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


def adapter_grouped(group: str | int, parallel_size: int = 1, stage: int = 3) -> ShardGroups:
    changes = {"adapter__shard_group": group, "experts__parallel_size": parallel_size}
    recipe = scene.recipe(Path("base"), stage=stage, **changes)
    return shard_groups(recipe, [0, 1, 2, 3] * 2, {"zero_optimization": {"stage": stage}})


def test_the_adapter_is_divided_among_all_ranks_or_in_groups_of_its_own():
    found = [adapter_grouped(group) for group in ("world", "node", 2, 1)]
    assert found == [ShardGroups(base=8, adapter=size) for size in (8, 4, 2, 1)]
    assert adapter_grouped(2, parallel_size=2).adapter == 2
    assert adapter_grouped("world", stage=2) == ShardGroups(base=1, adapter=8)


def test_owners_of_experts_are_of_one_group_of_the_adapter():
    text = (
        r"adapter\.shard_group=2: the 4 ranks of experts\.parallel_size do not divide a group of 2; choose a multiple"
    )
    with pytest.raises(UserError, match=text):
        adapter_grouped(2, parallel_size=4)


def test_groups_of_the_adapter_need_zero_3():
    with pytest.raises(UserError, match=r"adapter\.shard_group=node: ds_configs/zero2\.json has ZeRO stage 2"):
        adapter_grouped("node", stage=2)


def test_a_group_crosses_nodes_where_its_ranks_are_not_neighbours_on_one():
    assert [crosses_nodes(size, [0, 1, 2, 3, 0, 1, 2, 3]) for size in (1, 2, 4, 8)] == [False, False, False, True]
    assert crosses_nodes(2, [0, 1, 2, 0, 1, 2])
