"""Whether a model may have learned the held-out items that it is asked: its run knows its prepared set by its key."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.manifest import read_manifest
from data_prep.prepared_folder import ITEMS
from data_prep.user_error import UserError
from trainer.checkpoint import storage
from trainer.checkpoint.manager import FOLDER, read_facts
from trainer.recipe_file import load_recipe
from trainer.run import run_dir

_UNREADABLE = (UserError, OSError, ValueError, KeyError, TypeError, RecursionError)  # files of any age and shape


@dataclass(frozen=True)
class Acquaintance:
    """What is known of one model. may_have_learned: how many of the asked items its run did not hold out; None where
    that is not known. prepared_dir: of the run, where it is another set than the one that is asked from."""

    may_have_learned: int | None
    prepared_dir: str | None = None

    def warning(self, name: str, asked: int) -> str | None:
        """One line where a comparison with this model may not be fair."""
        if self.may_have_learned is None:
            return f"warning: no run says which prepared set {name} was trained on: it may have learned the asked items"
        if not self.may_have_learned:
            return None
        return (
            f"warning: {name} was trained on another prepared set ({self.prepared_dir}), which does not hold out "
            f"{self.may_have_learned} of the {asked} asked items: it may have learned them; compare runs on one set"
        )


def acquaintances(
    adapters: Mapping[str, Path | None], key: str, items: Sequence[dict[str, Any]]
) -> dict[str, Acquaintance]:
    """By name of each model that has an adapter. key: of the prepared set that the items are held out of."""
    return {name: _acquaintance(folder, key, items) for name, folder in adapters.items() if folder is not None}


def _acquaintance(adapter: Path, key: str, items: Sequence[dict[str, Any]]) -> Acquaintance:
    run = run_dir.run_of(adapter)
    own_key = None if run is None else _prepared_key(run)
    if run is None or own_key is None:
        return Acquaintance(None)
    if own_key == key:
        return Acquaintance(0)
    try:
        prepared_dir = load_recipe(run / run_dir.RECIPE).data.prepared_dir
    except UserError:
        return Acquaintance(None)
    held_out = _held_out(prepared_dir, own_key)
    return Acquaintance(sum(_identity(item) not in held_out for item in items), str(prepared_dir))


def _prepared_key(run: Path) -> str | None:
    """The key of the set that a run was trained on, as its last start says, or its newest checkpoint; else None."""
    if (key := run_dir.last_start(run).get("prepared_key")) is not None:
        return str(key)
    try:  # runs of 0.1.0 say it in their checkpoints only
        newest = max(storage.steps_in(run / FOLDER))
        return str(read_facts(run / FOLDER / storage.folder_name(newest))["prepared_key"])
    except _UNREADABLE:
        return None


def _held_out(prepared_dir: Path, key: str) -> set[str]:
    """The items of the set with this key; empty if that set is not there any more."""
    try:
        if (read_manifest(prepared_dir) or {}).get("key") != key:
            return set()
        with (prepared_dir / ITEMS).open(encoding="utf-8") as file:
            return {_identity(json.loads(line)) for line in file}
    except _UNREADABLE:
        return set()


def _identity(item: dict[str, Any]) -> str:
    """An item's conversation without the recipe's system prompt, and its answer."""
    said = [turn for turn in item["messages"] if turn["role"] != "system"]
    return json.dumps([said, item["answer"]], sort_keys=True)
