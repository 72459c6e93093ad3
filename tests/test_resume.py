"""Whether a changed recipe may go on with a run."""

import pytest

from data_prep.errors import UserError
from tests.distributed import scene
from trainer.recipe import Recipe
from trainer.resume import HARMLESS, accept_changes, differences

BASE = "base"


def accept(**changes):
    return accept_changes(scene.recipe(BASE), scene.recipe(BASE, **changes), "refused", "think again")


def test_what_only_changes_how_it_computes_is_told_and_accepted():
    lines = accept(train__micro_batch_size=2, experts__parallel_size=2, deepspeed__config="other.json")
    assert lines == [
        "changed         experts.parallel_size was 1 and is 2",
        "changed         train.micro_batch_size was 1 and is 2",
        "changed         deepspeed.config was 'ds_configs/zero3.json' and is 'other.json'",
    ]


@pytest.mark.parametrize(
    "changes", [{"adapter__alpha": 9}, {"train__learning_rate": 1}, {"run__seed": 4}, {"base__dtype": "bf16"},
                {"train__steps": 6}, {"data__seq_len": 128}]
)  # fmt: skip
def test_what_changes_the_run_is_refused_by_name(changes):
    (key,) = changes
    with pytest.raises(UserError, match=f"^refused: {key.replace('__', '.')} was .*; undo that or think again$"):
        accept(**changes)


def test_every_harmless_key_is_a_key_of_the_recipe():
    resolved = scene.recipe(BASE).model_dump(mode="json")
    for key in HARMLESS:
        section, _, name = key.partition(".")
        assert not name or name in resolved[section], key


def test_differences_are_found_at_any_depth():
    old = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    new = {"a": {"b": 1, "c": {"d": 3}}, "e": [1, 2], "f": 4}
    assert list(differences(old, new)) == [("a.c.d", 2, 3), ("e", [1], [1, 2]), ("f", None, 4)]


def test_a_recipe_reads_back_equal_from_a_checkpoint():
    recipe = scene.recipe(BASE)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
