"""The recipes in launch/recipes: short, and each says how it is launched."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe

FOLDER = Path(__file__).resolve().parents[1] / "launch" / "recipes"
recipes = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)


def places(value: Any, place: tuple[int | str, ...] = ()) -> Iterator[tuple[int | str, ...]]:
    """Where every key is, sections included."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        if isinstance(key, str):
            yield (*place, key)
        yield from places(inner, (*place, key))


def without(values: dict[str, Any], place: tuple[int | str, ...]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    parent = values
    for key in place[:-1]:
        parent = parent[key]
    del parent[place[-1]]
    return values


@recipes
def test_a_shipped_recipe_states_no_default(path):
    values = yaml.safe_load(path.read_text())
    whole = Recipe.model_validate(values)
    needless = []
    for place in places(values):
        try:
            if Recipe.model_validate(without(values, place)) == whole:
                needless.append(".".join(map(str, place)))
        except ValidationError:
            pass  # a key that is required
    assert not needless, f"{path.name} states defaults; remove {', '.join(needless)}"


@recipes
def test_a_shipped_recipe_opens_with_the_commands_that_launch_it(path):
    opening = path.read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in opening)
    assert any("train" in line and f"launch/recipes/{path.name}" in line for line in opening)
    assert load_recipe(path).run.name == path.stem
