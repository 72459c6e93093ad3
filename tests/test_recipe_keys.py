"""A key that is given twice is refused, wherever it stands: YAML would keep the last value and drop the first."""

from pathlib import Path

import pytest

from data_prep.recipe_yaml import load_yaml
from data_prep.user_error import UserError
from tests.support.minimal_recipe import MINIMAL
from trainer.recipe_file import load_recipe


def refused(path: Path, text: str, message: str, *overrides: str) -> None:
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert str(caught.value) == message


SECTION = """
  steps: 4
  global_batch_size: 4
  learning_rate: 1.0e-4
  warmup_steps: 1
  learning_rate: 1.0e-3
"""
SOURCE = """
data:
  sources:
    - {type: files, task: a, path: a.jsonl}
    - type: files
      task: b
      path: b.jsonl
      path: c.jsonl
"""


@pytest.mark.parametrize(
    ("text", "key", "first", "second"),
    [
        (f"run: {{name: a}}\ntrain:{SECTION}", "train.learning_rate", 5, 7),
        ("run: {name: a}\nbase: {model: m}\nrun: {name: b}\n", "run", 1, 3),
        (SOURCE, "data.sources[1].path", 7, 8),
        ("train: {steps: 1, steps: 2}", "train.steps", 1, 1),
        ("train: {steps: 1,\n  steps: 1}", "train.steps", 1, 2),
        ('train:\n  steps: 1\n  "steps": 2', "train.steps", 2, 3),
        ("data: {sources: [{options: {a: [{b: 1, b: 2}]}}]}", "data.sources[0].options.a[0].b", 1, 1),
        ("data: {sources: [{options: {1: a, 0x1: b}}]}", "data.sources[0].options.1", 1, 1),
        ("a: &a {x: 1}\nb: &b {y: 2}\nrun:\n  <<: *a\n  <<: *b\n", "run.<<", 4, 5),
    ],
    ids=[
        "section",
        "top level",
        "list item",
        "flow mapping",
        "over two lines",
        "quoted",
        "deep",
        "number",
        "merge key",
    ],
)
def test_a_key_given_twice_in_a_file_is_refused_with_both_lines(tmp_path, text, key, first, second):
    path = tmp_path / "recipe.yaml"
    message = f"recipe {path}: key {key} is given twice, on lines {first} and {second}; remove one"
    refused(path, text, message)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train={steps: 1, global_batch_size: 8, steps: 2}", "train.steps"),
        ("data.sources=[{type: files, task: a, path: b, path: c}]", "data.sources[0].path"),
        ("data.sources.0={type: files, task: a, path: b, path: c}", "data.sources.0.path"),
    ],
)
def test_a_key_given_twice_in_an_override_is_refused(tmp_path, override, key):
    message = f"argument {override!r}: key {key} is given twice; remove one"
    refused(tmp_path / "recipe.yaml", MINIMAL, message, override)


MERGED = """
{a: {deep: {own: &own {<<: &shared {x: 1, y: 2}, x: 3}}}, b: {<<: *own, y: 4}, c: [*shared, *shared],
 d: {<<: [*own, {z: 5, x: 6}]}}
"""


def test_merge_keys_and_aliases_are_no_repeated_keys():
    found = load_yaml(MERGED)
    assert found["a"]["deep"]["own"] == {"x": 3, "y": 2}
    assert found["b"] == {"x": 3, "y": 4}
    assert found["c"] == [{"x": 1, "y": 2}] * 2
    assert found["d"] == {"x": 3, "y": 2, "z": 5}


def test_the_same_key_in_several_sections_is_no_repeated_key(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL.replace("{name: first}", "{name: first, seed: 1}").replace("seq_len", "seed: 2\n  seq_len"))
    recipe = load_recipe(path)
    assert (recipe.run.seed, recipe.data.seed) == (1, 2)
