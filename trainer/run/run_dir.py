"""A run's directory: what lies where, who may write into it, and what a finished run looks like."""

import json
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.publish import write_atomically
from data_prep.user_error import UserError
from trainer.recipe import Recipe
from trainer.recipe_file import dump_recipe, load_recipe

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
ADAPTER = "adapter"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets")


def find(recipe: Recipe) -> Recipe | None:
    """The recipe of the run that the directory holds, or None where it is empty or absent.

    Raises UserError where it holds files of no run, or cannot be read.
    """
    directory = recipe.run.directory
    try:
        if not directory.exists() or (directory.is_dir() and all(p.name.startswith(".") for p in directory.iterdir())):
            return None  # a start that was killed at once may have left a file half-written
    except OSError as error:
        raise UserError(
            f"run.output_dir={recipe.run.output_dir}: cannot read {directory} ({error.strerror}); give another folder"
        ) from error
    if not (directory / RECIPE).is_file():
        raise UserError(
            f"run.name={recipe.run.name}: {directory} holds files that belong to no run; {name_another(recipe)}"
        )
    return load_recipe(directory / RECIPE)


def name_another(recipe: Recipe) -> str:
    """A remedy, where a run's directory is taken."""
    return f"give another run.name, such as run.name={recipe.run.name}-2"


def create(recipe: Recipe, environment: dict[str, Any]) -> None:
    """Makes the directory with recipe.yaml as resolved and environment.json, of every start. On rank 0 alone.

    Raises UserError where the place cannot be written.
    """
    directory = recipe.run.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        starts = [*_earlier_starts(directory / ENVIRONMENT), {**_environment(), **environment}]
        write_atomically(directory / RECIPE, dump_recipe(recipe))  # first: by it the directory is known as a run's
        write_atomically(directory / ENVIRONMENT, json.dumps(starts, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"run.output_dir={recipe.run.output_dir}: cannot write {directory} ({error.strerror}); give a folder that "
            "can be written"
        ) from error


def open_run(directory: Path) -> Recipe:
    """The recipe of a finished run. Raises UserError where there is none."""
    if not (directory / RECIPE).is_file():
        raise UserError(f"{directory}: no run here (no {RECIPE}); give a folder that `teamlora train` made")
    if not (directory / ADAPTER).is_dir():
        raise UserError(f"{directory}: the run has not finished, so it has no {ADAPTER}/; train it to its end")
    return load_recipe(directory / RECIPE)


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return []


def versions() -> dict[str, str]:
    """Versions of the packages on which results rest."""
    return {name: version(name) for name in PACKAGES}


def _environment() -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions(),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
