"""What ranks, nodes and DeepSpeed's configuration must be for a placement."""

from pathlib import Path

import pytest

from data_prep.user_error import UserError
from trainer.distributed.deepspeed_config import check_expert_parallel
from trainer.recipe import ExpertsConfig

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
