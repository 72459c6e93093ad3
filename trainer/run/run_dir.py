"""The run directory: its files, how it is created, and how a finished run is opened."""

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.publish import check_publishable, write_atomically
from data_prep.user_error import UserError
from trainer.recipe import Recipe
from trainer.recipe_file import dump_recipe, load_recipe
from trainer.run.provenance import commit, package_version, versions

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
ADAPTER = "adapter"
_ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, which takes seconds to import


def find(recipe: Recipe) -> Recipe | None:
    """Recipe of the run that is already in the recipe's directory; None if the directory is empty or absent.

    Raises UserError if it holds other files or cannot be read.
    """
    directory = recipe.run.directory
    try:
        if not directory.exists() or (directory.is_dir() and _is_unused(directory)):
            return None
    except OSError as error:
        raise UserError(
            f"run.output_dir={recipe.run.output_dir}: cannot read {directory} ({error.strerror}); give another folder"
        ) from error
    if not (directory / RECIPE).is_file():
        raise UserError(
            f"run.name={recipe.run.name}: {directory} holds files that belong to no run; {name_another(recipe)}"
        )
    return load_recipe(directory / RECIPE)


def _is_unused(directory: Path) -> bool:
    """Whether it holds no files, at most empty folders, such as a mount point for checkpoints/."""
    return all(path.is_dir() and not _visible(path) for path in _visible(directory))


def _visible(folder: Path) -> list[Path]:
    """Without hidden, partly written files of a start that was killed early, and what a new ext4 volume holds."""
    return [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "lost+found"]


def name_another(recipe: Recipe) -> str:
    """The remedy to suggest when a run directory is already in use."""
    return f"give another run.name, such as run.name={recipe.run.name}-2"


@contextlib.contextmanager
def refuse_unwritable(recipe: Recipe) -> Iterator[None]:
    """Turns an OSError about the run directory into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run.output_dir={recipe.run.output_dir}: cannot write {recipe.run.directory} ({error.strerror}); give a "
            "folder that can be written"
        ) from error


def create(recipe: Recipe, environment: dict[str, Any]) -> None:
    """Writes the resolved recipe.yaml, and environment.json with one entry per start. Call it on rank 0 only.

    Raises UserError if the directory cannot be written, or no adapter could be published there in the end.
    """
    directory = recipe.run.directory
    with refuse_unwritable(recipe):
        directory.mkdir(parents=True, exist_ok=True)
        check_publishable(directory / ADAPTER)
        starts = [*_earlier_starts(directory / ENVIRONMENT), {**_environment(), **environment}]
        write_atomically(directory / RECIPE, dump_recipe(recipe))  # first: `find` recognizes a run by it
        write_atomically(directory / ENVIRONMENT, json.dumps(starts, indent=2) + "\n")


def is_finished(directory: Path) -> bool:
    """Whether the run in `directory` has its adapter. An empty adapter/ may be a mount point for it."""
    return (directory / ADAPTER / _ADAPTER_CONFIG).is_file()


def open_run(directory: Path) -> Recipe:
    """Recipe of a finished run. Raises UserError if there is none in `directory`."""
    if not (directory / RECIPE).is_file():
        raise UserError(f"{directory}: no run here (no {RECIPE}); give a folder that `teamlora train` made")
    if not is_finished(directory):
        raise UserError(f"{directory}: the run has not finished, so it has no {ADAPTER}/; train it to its end")
    return load_recipe(directory / RECIPE)


def run_of(adapter: Path) -> Path | None:
    """The run whose adapter/ this folder is; None for an adapter's folder elsewhere."""
    run = adapter.absolute().parent
    return run if adapter.absolute().name == ADAPTER and (run / RECIPE).is_file() else None


def last_start(directory: Path) -> dict[str, Any]:
    """What environment.json says of the run's last start; empty without it."""
    last = [{}, *_earlier_starts(directory / ENVIRONMENT)][-1]
    return last if isinstance(last, dict) else {}


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return starts if isinstance(starts, list) else []


def _environment() -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "teamlora": package_version(),
        "commit": commit(),
        "versions": versions(),
    }
