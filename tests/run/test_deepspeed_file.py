"""Which file deepspeed.config means: a path, or the name of a file in ds_configs, from any working directory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import trainer.run.resources
from data_prep.user_error import UserError
from tests.support.minimal_recipe import MINIMAL
from trainer.distributed.deepspeed_config import read_deepspeed_config
from trainer.estimate.suggest import suggest
from trainer.objective.batches import plan_batches
from trainer.recipe import Recipe
from trainer.recipe_file import dump_recipe, load_recipe
from trainer.run.resources import find_deepspeed_config

SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The working directory, which is not the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("value", ["zero3", "ds_configs/zero3.json", SHIPPED / "zero3.json"])
def test_shipped_files_are_found_from_anywhere(value):
    assert find_deepspeed_config(Path(value)) == SHIPPED / "zero3.json"


@pytest.mark.parametrize("value", ["zero3", "ds_configs/zero3.json", "zero3.json", "own/zero3.json"])
def test_a_file_at_the_given_path_comes_first(elsewhere, value):
    (elsewhere / value).parent.mkdir(exist_ok=True)
    (elsewhere / value).write_text("{}")
    assert find_deepspeed_config(Path(value)) == Path(value)


def test_a_folder_of_the_same_name_is_not_the_file(elsewhere):
    (elsewhere / "zero3").mkdir()
    assert find_deepspeed_config(Path("zero3")) == SHIPPED / "zero3.json"


@pytest.mark.parametrize("value", ["zero4", "zero3.json", "ds_configs/zero4.json", "own/zero3.json", "/no/zero3.json"])
def test_an_unknown_file_is_refused_with_the_known_names(value):
    with pytest.raises(UserError) as caught:
        find_deepspeed_config(Path(value))
    assert str(caught.value) == (
        f"deepspeed.config={value}: No such file or directory; give a DeepSpeed JSON file, or one of "
        "single, zero2, zero3, zero3_offload"
    )


def test_a_name_is_resolved_where_the_file_is_read_and_stays_as_written(elsewhere):
    (elsewhere / "recipe.yaml").write_text(MINIMAL)
    recipe = load_recipe(elsewhere / "recipe.yaml", ["deepspeed.config=zero2"])
    assert read_deepspeed_config(recipe, plan_batches(8, 1, 2))["zero_optimization"]["stage"] == 2
    assert yaml.safe_load(dump_recipe(recipe))["deepspeed"] == {"config": "zero2"}


@pytest.mark.parametrize(
    ("given", "offered"),
    [
        ("zero2", ["zero3", "zero3_offload"]),
        ("zero3", ["zero3_offload"]),
        ("ds_configs/zero2.json", ["ds_configs/zero3.json", "ds_configs/zero3_offload.json"]),
        ("own/zero2.json", ["own/zero3.json"]),
    ],
)
def test_an_estimate_tries_the_configurations_beside_the_given_one(elsewhere, given, offered):
    (elsewhere / "own").mkdir()
    (elsewhere / "own" / "zero3.json").write_text("{}")
    (elsewhere / "recipe.yaml").write_text(MINIMAL)
    recipe = load_recipe(elsewhere / "recipe.yaml", [f"deepspeed.config={given}"])
    tried: list[str] = []

    def nothing_fits(recipe: Recipe, world_size: int) -> SimpleNamespace:
        tried.append(str(recipe.deepspeed.config))
        return SimpleNamespace(recipe=recipe, world_size=world_size, fits=lambda *_: False)

    suggest(SimpleNamespace(estimate=nothing_fits), nothing_fits(recipe, 1), 0, 0)
    assert list(dict.fromkeys(tried)) == [given, *offered]


def test_a_folder_is_refused(elsewhere):
    with pytest.raises(UserError, match=r"^deepspeed\.config=\.: Is a directory; give a DeepSpeed JSON file"):
        find_deepspeed_config(Path("."))


def test_without_a_repository_the_installed_files_are_found(elsewhere, monkeypatch):
    """As in a wheel, whose package data holds them as trainer/ds_configs."""
    package = elsewhere / "site-packages" / "trainer"
    (package / "ds_configs").mkdir(parents=True)
    (package / "ds_configs" / "zero3.json").write_text("{}")
    monkeypatch.setattr(trainer.run.resources, "PACKAGE_ROOT", package.parent)
    assert find_deepspeed_config(Path("zero3")) == package / "ds_configs" / "zero3.json"


def test_without_any_shipped_files_a_name_is_refused(elsewhere, monkeypatch):
    monkeypatch.setattr(trainer.run.resources, "PACKAGE_ROOT", elsewhere)
    with pytest.raises(UserError, match=r"^deepspeed\.config=zero3: No such file"):
        find_deepspeed_config(Path("zero3"))
