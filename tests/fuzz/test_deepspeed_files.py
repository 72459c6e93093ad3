"""Damaged DeepSpeed files: taken for what they say, or refused in one line before DeepSpeed is imported."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzzing import Outcomes, fuzz, writes_nothing
from tests.fuzz.mutations import at, leaves, mutated_bytes, mutated_texts, mutated_trees, values
from tests.fuzz.test_recipes import REPOSITORY, folder_of
from tests.support.minimal_recipe import MINIMAL
from trainer.distributed.deepspeed_config import read_deepspeed_config
from trainer.distributed.deepspeed_file import read_deepspeed_file
from trainer.objective.batches import plan_batches
from trainer.recipe_file import load_recipe

TEXTS = [path.read_text() for path in sorted((REPOSITORY / "ds_configs").glob("*.json"))]
HF = {
    "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}, "gradient_clipping": "auto",
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    "optimizer": "auto", "steps_per_print": 2000, "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto", "sub_group_size": 1e9,
        "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "none"},
        "stage3_param_persistence_threshold": "auto", "stage3_gather_16bit_weights_on_model_save": True,
    },
    "activation_checkpointing": {}, "aio": {"block_size": 1048576}, "torch_autocast": {"enabled": False},
}  # fmt: skip
TREES = [HF, *map(json.loads, TEXTS)]
FRAGMENTS = [
    "1e400", "-1", "NaN", "Infinity", "null", "true", '"3"', '"auto"', "{}", "[]", "9" * 5000, "[" * 5000,
    '{"a":' * 3000, ",", "}", '"', "'", "//", '"stage": 3,', '"zero_optimization": {"stage": 0},', '"\\ud800"', "\0",
    '"bf16": true,', '"stage3_prefetch_bucket_size": 0.5,', "\x85", "1.0", '"\\n"',
]  # fmt: skip
KNOWN = [
    {"zero_optimization": {"stage": "three"}}, {"zero_optimization": {"stage": 3, "offload_param": "cpu"}},
    {"zero_optimization": {"stage": 3, "reduce_bucket_size": -5}}, {"zero_optimization": {"stage": 3}, "bf16": True},
    {"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 5}}, {"zero_optimization": 3}, [], 3, None, "x",
    {"zero_optimization": {"stage": 3}, "torch_autocast": {"enabled": True}},
    {"zero_optimization": {"stage": 3}, "data_types": {"grad_accum_dtype": "fp32"}},
    {"zero_optimization": {"stage": 3}, "communication_data_type": "fp16"},
    {"zero_optimization": {"stage": 3}, "steps_per_print": True},
    {"zero_optimization": {"stage": 3}, "steps_per_prin": 1}, {"zero_optimization": {"stage": True}},
    {"zero_optimization": {"stage": 3, "sub_group_size": 1e308}},
    {"zero_optimization": {"stage": 3, "sub_group_size": 10**30}},
    {"zero_optimization": {"stage": 3, "reduce_bucket_size": 2**63}},
    {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "a\0b"}}},
]  # fmt: skip


def check(content: bytes, outcomes: Outcomes, factory: Any) -> dict[str, Any] | None:
    """The filled configuration, which is JSON whose numbers DeepSpeed can hold; None where it is refused."""
    folder = folder_of(factory)
    (folder / "recipe.yaml").write_text(MINIMAL)
    (folder / "ds.json").write_bytes(content)
    recipe = load_recipe(folder / "recipe.yaml", [f"deepspeed.config={folder / 'ds.json'}"])
    with writes_nothing(folder):
        config = outcomes.of(lambda: read_deepspeed_config(recipe, plan_batches(8, 1, 2)))
    if config is not None:
        json.dumps(config, allow_nan=False).encode()
        for path, value in leaves(config):
            assert not isinstance(value, int) or abs(value) < 2**63, (path, value)
            assert "\0" not in str(value), (path, value)
        assert config["train_batch_size"] == 8 and config["train_micro_batch_size_per_gpu"] == 1
    return config


@fuzz(0.1)
@given(tree=mutated_trees(TREES, values()))
def test_files_with_changed_values(tree, outcomes: Outcomes, tmp_path_factory):
    config = check(json.dumps(tree).encode(), outcomes, tmp_path_factory)
    if config is None:
        return
    config = read_deepspeed_file(folder_of(tmp_path_factory) / "ds.json")
    for path, given_value in leaves(tree):
        if isinstance(given_value, int | float) and "fp16" not in path:
            try:
                read = at(config, path)
            except KeyError:
                continue  # a key of a section that is off
            assert read == given_value and (isinstance(read, bool) or not isinstance(given_value, bool)), path


@fuzz(0.1)
@given(content=mutated_bytes(mutated_texts([*TEXTS, json.dumps(HF, indent=1)], FRAGMENTS)) | st.binary(max_size=20))
def test_files_with_changed_text(content, outcomes: Outcomes, tmp_path_factory):
    check(content, outcomes, tmp_path_factory)


@pytest.mark.parametrize("tree", KNOWN, ids=lambda tree: str(tree)[:60])
def test_what_was_a_traceback_or_trained_otherwise_is_refused(tree, outcomes: Outcomes, tmp_path_factory):
    assert check(json.dumps(tree).encode(), outcomes, tmp_path_factory) is None


def test_each_base_is_accepted(outcomes: Outcomes, tmp_path_factory):
    for tree in TREES:
        assert check(json.dumps(tree).encode(), outcomes, tmp_path_factory) is not None
