"""The local folder of a base model, found without importing anything heavy."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.sources.file_kind import refuse_lfs_pointer
from data_prep.user_error import UserError
from data_prep.user_path import is_file_name

if TYPE_CHECKING:
    from trainer.recipe import BaseModelConfig

# Pickles and other formats stay where they are; code only on demand.
FROM_THE_HUB = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
NOT_FROM_THE_HUB = ["consolidated*", "original/*"]  # the same weights once more, as their makers' own code reads them
SMALL_FILES = ["config.json", "*token*", "*.model", "vocab*", "merges*"]  # without which no model is built


def resolve_folder(base: "BaseModelConfig", patterns: Sequence[str] = FROM_THE_HUB) -> Path:
    """The local folder of `base.model`, fetched from the Hub where it is an id and not a folder.

    patterns: the files that are fetched. Raises UserError where it is neither, cannot be fetched, or holds Git LFS
    pointers.
    """
    folder = Path(base.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"base.model: {folder} has no config.json; expected the folder of a transformers model")
        for pattern in SMALL_FILES:
            _refuse_lfs_pointers(folder.glob(pattern))
        return folder
    if folder.is_file():
        raise UserError(f"base.model: {folder} is a file; expected a folder with config.json and *.safetensors")
    if not may_be_of_the_hub(base.model):
        raise UserError(f"base.model: folder {base.model} does not exist; expected a folder or a Hub id")
    return _fetch(base, patterns)


def may_be_of_the_hub(model: str) -> bool:
    """Whether `base.model` can be an id of the Hub, and not a folder only."""
    return not (model.startswith(("/", ".", "~")) or model.count("/") > 1)


def files_of_model(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read, sorted; some folders hold the weights in other forms too.

    That is model.safetensors, else what its index names, else all there are. Raises UserError for an index that cannot
    be read, and for Git LFS pointers.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        _refuse_lfs_pointers([index])
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if elsewhere := [name for name in names if not is_file_name(name)]:
                raise ValueError(f"it names {elsewhere[0]!r}, where files of its folder are expected")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index}: not readable as an index ({one_line(error)}); fetch the model again") from error
        files = sorted(folder / name for name in names)
    _refuse_lfs_pointers(files)
    return files


def _refuse_lfs_pointers(files: Iterable[Path]) -> None:
    for path in sorted(files):
        refuse_lfs_pointer(path, "base.model")


def _fetch(base: "BaseModelConfig", patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    code = ["*.py"] if base.trust_remote_code else []
    try:
        allow = [*patterns, *code]
        return Path(
            snapshot_download(
                base.model, revision=base.revision, allow_patterns=allow, ignore_patterns=NOT_FROM_THE_HUB
            )
        )
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
