"""What one process holds after a step under each ZeRO stage; for several ranks see tests/distributed."""

import json

import pytest

from tests.estimate.built_engine import STAGES, recipe_of
from tests.support.ranks import run_ranks
from tests.support.tiny_adapters import adapted
from tests.support.tiny_models import tiny_llama
from trainer.estimate.estimate import Estimator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    sizes = {"hidden_size": 60, "intermediate_size": 101, "vocab_size": 300}
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama", tie=True, **sizes)


@pytest.fixture(scope="module")
def built(base, tmp_path_factory):
    """Bytes held in each case, from a separate process: DeepSpeed keeps its groups for the life of a process."""
    folder = tmp_path_factory.mktemp("built")
    run_ranks(1, ["-m", "tests.estimate.built_engine", str(base), str(folder)])
    return json.loads((folder / "held.json").read_text())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_estimated_bytes_match_a_built_engine(base, built, tmp_path, stage, dtype):
    recipe = recipe_of(base, tmp_path, stage, dtype)
    held = built[f"{stage}-{dtype}"]
    estimated = {use.name: use.device + use.host for use in Estimator(recipe).estimate(recipe, 1).resident}
    assert {category: estimated[category] for category in held} == held


def test_an_adapter_to_start_from_counts_like_a_fresh_one(base, tmp_path):
    adapted(base, "teamlora", expert_rank=4, alpha=8).save_pretrained(tmp_path / "adapter")
    recipe = recipe_of(base, tmp_path, 3, "fp32")
    begun = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"init_from": tmp_path / "adapter"})})
    assert Estimator(begun).estimate(begun, 1).resident == Estimator(recipe).estimate(recipe, 1).resident
