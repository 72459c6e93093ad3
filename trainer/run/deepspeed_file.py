"""Finds the DeepSpeed configuration that a recipe names: a file of the user's, or one that ships in ds_configs."""

import os
from importlib.resources import files
from pathlib import Path

from data_prep.user_error import UserError

FOLDER = "ds_configs"


def find_deepspeed_config(value: Path) -> Path:
    """The file that `deepspeed.config` means: a path, or a shipped file as `zero3` or `ds_configs/zero3.json`.

    A file at the given path comes first. Call this where the file is read and keep the value as written: a run's
    recipe.yaml may be read on another machine. Raises UserError where there is no such file.
    """
    if os.path.exists(value) and not os.path.isdir(value):
        return value
    shipped = shipped_configs()
    if value.stem in shipped and value in (Path(value.stem), Path(FOLDER, f"{value.stem}.json")):
        return shipped[value.stem]
    try:
        os.stat(value)
        reason = "Is a directory"
    except OSError as error:
        reason = error.strerror
    raise UserError(f"deepspeed.config={value}: {reason}; give a DeepSpeed JSON file, or one of {', '.join(shipped)}")


def shipped_configs() -> dict[str, Path]:
    """The configurations in ds_configs by name: those of the repository, else those installed with the package."""
    folder = Path(__file__).parents[2] / FOLDER
    if not folder.is_dir():
        try:
            folder = files(f"trainer.{FOLDER}")
        except ModuleNotFoundError:
            return {}
    return {path.stem: path for path in sorted(Path(str(each)) for each in folder.iterdir()) if path.suffix == ".json"}
