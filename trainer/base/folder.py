"""The local folder of a base model, found without importing anything heavy."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UserError

if TYPE_CHECKING:
    from trainer.recipe import BaseModelConfig

# Pickles and other formats stay where they are; code only on demand.
FROM_THE_HUB = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def resolve_folder(base: "BaseModelConfig", patterns: Sequence[str] = FROM_THE_HUB) -> Path:
    """The local folder of `base.model`, fetched from the Hub where it is an id and not a folder.

    patterns: the files that are fetched. Raises UserError where it is neither, or cannot be fetched.
    """
    folder = Path(base.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"base.model: {folder} has no config.json; expected the folder of a transformers model")
        return folder
    if folder.is_file():
        raise UserError(f"base.model: {folder} is a file; expected a folder with config.json and *.safetensors")
    if not may_be_of_the_hub(base.model):
        raise UserError(f"base.model: folder {base.model} does not exist; expected a folder or a Hub id")
    return _fetch(base, patterns)


def may_be_of_the_hub(model: str) -> bool:
    """Whether `base.model` can be an id of the Hub, and not a folder only."""
    return not (model.startswith(("/", ".", "~")) or model.count("/") > 1)


def _fetch(base: "BaseModelConfig", patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    code = ["*.py"] if base.trust_remote_code else []
    try:
        return Path(snapshot_download(base.model, revision=base.revision, allow_patterns=[*patterns, *code]))
    except Exception as error:  # many kinds: no network, no such id, no access, a malformed id
        revision = f" at revision {base.revision}" if base.revision else ""
        raise UserError(
            f"base.model: no folder {base.model} here, and it could not be fetched from the Hub{revision}: "
            f"{type(error).__name__} ({one_line(error)}); "
            "give a local folder, or check the id and the network"
        ) from error


def one_line(error: Exception) -> str:
    """The text of an exception on one line, shortened."""
    return " ".join(str(error).split())[:200]
