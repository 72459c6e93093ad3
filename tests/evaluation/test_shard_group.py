"""Over which ranks a sharded evaluation divides the base: as training did, or all of them."""

import pytest
import yaml

from tests.support.minimal_recipe import MINIMAL
from trainer.evaluation.evaluate import _shard_group
from trainer.recipe import Recipe


@pytest.mark.parametrize(
    ("shard_group", "local_ranks", "size"),
    [("world", [0, 1], 2), (1, [0, 1], 1), ("node", [0, 1, 0, 1], 2), (4, [0, 1], 2), ("node", [0, 1, 0], 3)],
)
def test_fewer_ranks_than_training_had_are_one_group(shard_group, local_ranks, size):
    content = yaml.safe_load(MINIMAL)
    recipe = Recipe.model_validate({**content, "base": {**content["base"], "shard_group": shard_group}})
    assert _shard_group(recipe, {"zero_optimization": {"stage": 3}}, local_ranks) == size
