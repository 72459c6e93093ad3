"""What is estimated from config.json alone is what each rank of a real engine holds, byte for byte."""

import json

import pytest

from tests.distributed.worker import HELD
from tests.support import scene
from trainer.estimate.estimate import Estimator

pytestmark = [pytest.mark.slow, pytest.mark.ranks_run("held")]


@pytest.mark.parametrize("name", HELD)
def test_estimated_bytes_by_category_are_those_that_each_rank_holds(seen, base, name):
    world, folder = seen
    recipe = scene.recipe(base, **HELD[name])
    estimated = {held.name: held for held in Estimator(recipe).estimate(recipe, world).resident}
    total = {category: held.device + held.host for category, held in estimated.items()}
    everyone = json.loads((folder / "held" / f"{name}.json").read_text())
    assert total["checkpoint copy"] == everyone[0][2] == max(copied for *_, copied in everyone)
    for told, learning, _ in everyone:
        for category in ("packed weights", "absmax", "unquantised", "adapter"):
            assert total[category] == told[category], category
        assert total["master copy"] == learning["master copy"]
        assert total["optimizer moments"] == learning["optimizer moments"]
        if name != "zero2":  # which frees its gradients after the step
            assert total["gradients"] == learning["gradients"]
    offloaded = recipe.deepspeed.config.stem.endswith("offload")
    assert all((estimated[c].device == 0) == offloaded for c in ("adapter", "gradients", "optimizer moments"))
