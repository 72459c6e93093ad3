"""The folder that runs get copies of: a base, a prepared set and a recipe; others that must not be taken for them."""

import shutil
from pathlib import Path

import yaml

from tests.support.tiny_models import tiny_llama
from tests.support.workplace import make_workplace
from trainer.cli import main


def make_spare(folder: Path) -> int:
    """The current folder, filled; returns the status of the preparations."""
    place = make_workplace(folder)
    recipe = yaml.safe_load(place.recipe.read_text())
    recipe["checkpoint"] = {"keep_last": 2}
    recipe["train"]["global_batch_size"] = 2  # short steps: starts and saves are what is soaked
    place.recipe.write_text(yaml.safe_dump(recipe))
    shutil.copytree(folder / "base", folder / "other-base")
    tiny_llama(folder / "other-base", tie=True, seed=1)
    other = ["data.prepared_dir=other-prepared", "data.held_out=4"]
    return main(["prepare", "recipe.yaml"]) or main(["prepare", "recipe.yaml", *other])
