"""Files that ship with the package: recipes and DeepSpeed configurations, found by name in a clone and in a wheel."""

import os
from pathlib import Path

from data_prep.user_error import UserError

# Symbolic links are kept: another machine may know this path, and not what a link on it leads to here.
PACKAGE_ROOT = Path(os.path.abspath(__file__)).parent.parent.parent
# What other processes are started by: a file, since `-m trainer` would import a folder named trainer in the user's
# current directory.
PROGRAM = PACKAGE_ROOT / "trainer" / "__main__.py"


def recipes() -> dict[str, Path]:
    """{name: file} of the recipes, by name."""
    return _by_name(_shipped("recipes", "launch/recipes"), ".yaml")


def ds_configs() -> dict[str, Path]:
    """{name: file} of the DeepSpeed configurations, by name."""
    return _by_name(_shipped("ds_configs", "ds_configs"), ".json")


def recipe_path(name: str) -> Path:
    """The recipe of that name, such as quickstart. Raises UserError for an unknown name."""
    return _find(name, recipes(), "recipe")


def ds_config_path(name: str) -> Path:
    """The DeepSpeed configuration of that name, such as zero3. Raises UserError for an unknown name."""
    return _find(name, ds_configs(), "DeepSpeed configuration")


def find_deepspeed_config(value: Path) -> Path:
    """The file that `deepspeed.config` means: a path, or a shipped file as `zero3` or `ds_configs/zero3.json`.

    A file at the given path comes first. Call this where the file is read and keep the value as written: a run's
    recipe.yaml may be read on another machine. Raises UserError where there is no such file.
    """
    if value.exists() and not value.is_dir():
        return value
    shipped = ds_configs()
    if value.stem in shipped and value in (Path(value.stem), Path("ds_configs", f"{value.stem}.json")):
        return shipped[value.stem]
    try:
        value.stat()
        reason = "Is a directory"
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(f"deepspeed.config={value}: {reason}; give a DeepSpeed JSON file, or one of {', '.join(shipped)}")


def recipe_description(path: Path) -> str:
    """First sentence of the comment that opens a recipe."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        words.append(text)
    return " ".join(words).partition(". ")[0].removesuffix(".")


def _shipped(in_wheel: str, in_clone: str) -> Path:
    """setup.cfg maps the clone's folder to the one inside the package."""
    installed = PACKAGE_ROOT / "trainer" / in_wheel
    return installed if installed.is_dir() else PACKAGE_ROOT / in_clone


def _by_name(folder: Path, suffix: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))}


def _find(name: str, known: dict[str, Path], kind: str) -> Path:
    if name not in known:
        raise UserError(f"{name}: expected the name of a {kind}; give one of {', '.join(known)}")
    return known[name]
