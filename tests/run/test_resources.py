"""Recipes and DeepSpeed configurations are found by name."""

import json

import pytest

from data_prep.user_error import UserError
from trainer.recipe_file import load_recipe
from trainer.run.resources import ds_config_path, ds_configs, recipe_description, recipe_path, recipes


def test_every_recipe_is_listed_with_one_line_of_description_and_loads():
    assert {"quickstart", "single_gpu", "zero3", "suite"} <= set(recipes())
    for name, path in recipes().items():
        assert recipe_path(name) == path
        description = recipe_description(path)
        assert 20 < len(description) < 160 and "\n" not in description, name
        load_recipe(path)


def test_every_deepspeed_configuration_is_listed_and_is_json():
    assert {"single", "zero2", "zero3", "zero3_offload"} <= set(ds_configs())
    for name, path in ds_configs().items():
        assert ds_config_path(name) == path
        json.loads(path.read_text())


@pytest.mark.parametrize("find", [recipe_path, ds_config_path])
def test_an_unknown_name_is_refused_with_the_known_ones(find):
    with pytest.raises(UserError, match=r"zero4: expected the name of a .*; give one of .*zero3"):
        find("zero4")


def test_the_description_is_the_first_sentence_of_the_opening_comment(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("# One GPU of 24 GB,\n# two tasks. More about it.\n#\n# teamlora train my.yaml\nrun: {}\n")
    assert recipe_description(path) == "One GPU of 24 GB, two tasks"
