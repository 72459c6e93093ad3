"""The recipe: what is filled in, overridden and written back, all before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.minimal_recipe import MINIMAL
from trainer.recipe import AdapterConfig
from trainer.recipe_file import dump_recipe, load_recipe


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_what_a_recipe_leaves_out_is_filled_in(path):
    recipe = load_recipe(path)
    assert recipe.run.directory == Path("runs/first")
    assert (recipe.run.seed, recipe.base.quantization, recipe.base.dtype) == (0, "nf4", "bf16")
    assert recipe.adapter.target_modules == ["gate_proj", "up_proj", "down_proj"]
    assert (recipe.adapter.num_experts, recipe.adapter.expert_rank, recipe.adapter.total_rank) == (4, 16, 64)
    assert (recipe.train.epochs, recipe.train.micro_batch_size, recipe.train.optimizer) == (None, 1, "adamw")
    assert (recipe.data.held_out, recipe.data.seed, recipe.data.system_prompt) == (0.05, 0, None)
    assert (recipe.report.tensorboard, recipe.report.router_every) == (True, 10)


@pytest.mark.parametrize(
    ("overrides", "section", "expected"),
    [
        (["train.steps=25", "train.steps=30"], "train", {"steps": 30}),
        (["train.steps=null", "train.epochs=1.5"], "train", {"steps": None, "epochs": 1.5}),
        (["train.learning_rate=1e-5"], "train", {"learning_rate": 1e-5}),
        (["adapter.target_modules=[q_proj]"], "adapter", {"target_modules": ["q_proj"]}),
        (["data.held_out=3", "data.system_prompt=a=b"], "data", {"held_out": 3, "system_prompt": "a=b"}),
        (["report.tensorboard=false"], "report", {"tensorboard": False}),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_overrides_are_yaml_and_the_last_one_counts(path, overrides, section, expected):
    found = getattr(load_recipe(path, overrides), section)
    assert {key: getattr(found, key) for key in expected} == expected


SHARED_OPTIONS = """[
  {type: reasoning_gym, task: a, generator: g, count: 3, options: &options {min_n: 1, sizes: [1, 2]}},
  {type: reasoning_gym, task: b, generator: g, count: 3, options: *options}]"""


@pytest.mark.parametrize(
    ("override", "task", "options"),
    [
        ("data.sources.1.options.min_n=3", "b", {"min_n": 3, "sizes": [1, 2]}),
        ("data.sources.1.options.max_n=3", "b", {"min_n": 1, "max_n": 3, "sizes": [1, 2]}),
        ("data.sources.1.options.sizes.1=5", "b", {"min_n": 1, "sizes": [1, 5]}),
        ("data.sources.1={type: reasoning_gym, task: c, generator: g, count: 1}", "c", {}),
    ],
)
def test_integers_in_an_override_address_items_of_a_list_and_no_other_place(path, override, task, options):
    first, second = load_recipe(path, [f"data.sources={SHARED_OPTIONS}", override]).data.sources
    assert first.options == {"min_n": 1, "sizes": [1, 2]}
    assert (second.task, second.options) == (task, options)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_a_learning_rate_is_read_in_every_notation(path, text):
    path.write_text(MINIMAL.replace("steps: 10", f"steps: 10, learning_rate: {text}"))
    assert load_recipe(path).train.learning_rate == 1e-4
    assert load_recipe(path, [f"train.learning_rate={text}"]).train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("given", "experts", "expert_rank", "total_rank"),
    [
        ({}, 4, 16, 64),
        ({"expert_rank": 8}, 4, 8, 32),
        ({"total_rank": 32}, 4, 8, 32),
        ({"num_experts": 3, "total_rank": 24, "expert_rank": 8}, 3, 8, 24),
        ({"method": "lora"}, 1, 16, 16),
        ({"method": "lora", "total_rank": 64}, 1, 64, 64),
    ],
)
def test_the_rank_that_is_not_given_follows_from_the_other(given, experts, expert_rank, total_rank):
    adapter = AdapterConfig(**given)
    assert (adapter.num_experts, adapter.expert_rank, adapter.total_rank) == (experts, expert_rank, total_rank)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.held_out=3", "data.system_prompt='yes: \"no\"'", "run.name='007'", "train.betas=[0.9, 0.95]"],
        ["train={epochs: 0.1, global_batch_size: 8, learning_rate: 1e-5}", "adapter={method: lora, total_rank: 8}"],
        ["data.sources=[{type: reasoning_gym, task: a, generator: b, count: 3, options: {x: [1], y: null}}]"],
    ],
)
def test_a_dumped_recipe_is_read_back_equal(path, tmp_path, overrides):
    recipe = load_recipe(path, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert type(load_recipe(again).data.held_out) is type(recipe.data.held_out)


def test_reading_a_recipe_imports_nothing_heavy(path):
    code = (
        "import sys; from pathlib import Path; from trainer.recipe_file import load_recipe; "
        "load_recipe(Path(sys.argv[1])); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "datasets", "deepspeed", "numpy", "pyarrow", "tokenizers", "reasoning_gym"}
    assert not heavy & set(done.stdout.split())
