"""Opens a prepared set for training, after checking that it matches the recipe and the tokenizer."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import DataConfig, FilesSource
from data_prep.differences import differences
from data_prep.fingerprint import comparable_config, file_states, tokenizer_hashes
from data_prep.manifest import SPLITS, read_manifest
from data_prep.prepared_folder import ITEMS
from data_prep.sources.finding import find_files
from data_prep.sources.read import source_key
from data_prep.user_error import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_REPAIR = "run `teamlora prepare RECIPE`"


@dataclass(frozen=True)
class PreparedSet:
    """A prepared set on disk.

    `train` and `held_out` are memory-mapped datasets of packed rows in numpy format: each row is a dictionary of the
    arrays input_ids, labels, position_ids and task_ids, [tokens of the row] each, at most seq_len tokens. `items` are
    the held-out documents to generate answers for: {"task", "messages" up to the answer, "answer", ...}; see items.py.
    """

    directory: Path
    manifest: dict[str, Any]
    train: "Dataset"
    held_out: "Dataset"
    items: list[dict[str, Any]]

    @property
    def tasks(self) -> list[str]:
        """Task names; a task id is an index into them."""
        return self.manifest["tasks"]


def open_prepared(config: DataConfig, tokenizer: Any) -> PreparedSet:
    """Opens the set in prepared_dir.

    Raises UserError if there is none, if it is damaged, if it was made with another tokenizer, chat template or data
    section, or if its sources have changed since; a source that cannot be read here is not checked.
    """
    directory, manifest = config.prepared_dir, manifest_for(config)
    _check_tokenizer(tokenizer, manifest, directory)
    _check_sources(config, manifest)
    try:
        train, held_out = (_open_split(directory, split, manifest) for split in SPLITS)
        with (directory / ITEMS).open(encoding="utf-8") as file:  # not splitlines: texts may hold its other line ends
            items = [json.loads(line) for line in file]
        return PreparedSet(directory, manifest, train, held_out, items)
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise UserError(f"data.prepared_dir: {directory} is damaged ({cause}); remove it and {_REPAIR}") from error


def manifest_for(config: DataConfig) -> dict[str, Any]:
    """The manifest in prepared_dir; reads nothing else.

    Raises UserError if there is none, or if the set was made with another data section.
    """
    directory = config.prepared_dir
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"data.prepared_dir: no prepared set in {directory}; {_REPAIR}")
    _check_config(config, manifest, directory)
    return manifest


def _check_config(config: DataConfig, manifest: dict[str, Any], directory: Path) -> None:
    try:
        made_with = comparable_config(DataConfig.model_validate(manifest["config"]))  # newer keys get their defaults
    except ValueError as error:
        raise UserError(f"data.prepared_dir: {directory} was prepared by another version; {_REPAIR}") from error
    for key, wanted, found in differences(comparable_config(config), made_with, "data"):
        raise UserError(f"{key}: the recipe says {wanted!r}, but {directory} was prepared with {found!r}; {_REPAIR}")


def _check_tokenizer(tokenizer: Any, manifest: dict[str, Any], directory: Path) -> None:
    made_with = manifest["tokenizer"]
    for name, found in tokenizer_hashes(tokenizer).items():
        if found != made_with[name]:
            what = "chat template" if name.startswith("chat_template") else "tokenizer"
            raise UserError(
                f"data.prepared_dir: {directory} was prepared with another {what} (sha256 {made_with[name][:12]}...) "
                f"than that of base.model ({found[:12]}...); {_REPAIR}"
            )


def _check_sources(config: DataConfig, manifest: dict[str, Any]) -> None:
    made_from = manifest["sources"]
    for index, source in enumerate(config.sources):
        if not isinstance(source, FilesSource):
            continue
        key = f"{source_key(index)}.path"
        before = [state for state in made_from if state["key"] == key]
        if not all(os.access(state["path"], os.R_OK) for state in before):
            continue  # a set may be used where its sources are not
        now = file_states(find_files(source, source_key(index))[0], key, before)
        was, has = ({state["path"]: state["sha256"] for state in states} for states in (before, now))
        for path in {**was, **has}:
            if was.get(path) != has.get(path):
                raise UserError(f"{key}: {path} has changed since it was prepared; {_REPAIR}")


def _open_split(directory: Path, split: str, manifest: dict[str, Any]) -> "Dataset":
    from datasets import load_from_disk

    rows = load_from_disk(directory / split).with_format("numpy")
    expected = manifest["splits"][split]["rows"]
    if len(rows) != expected:
        raise ValueError(f"{split} has {len(rows)} rows, expected {expected}")
    return rows
