"""Writes a prepared set so that it is there whole or not at all."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.documents import with_system_prompt
from data_prep.encode import Encoded
from data_prep.errors import UserError
from data_prep.manifest import MANIFEST, Rows

ITEMS = "items.jsonl"


def refuse_foreign_folder(directory: Path) -> None:
    """Raises UserError where `directory` holds something that is no prepared set and would be replaced."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"data.prepared_dir: {directory} is a file; give a folder that does not exist yet")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / MANIFEST).exists():
        raise UserError(
            f"data.prepared_dir: {directory} holds files but no prepared set, and would be replaced; give a folder "
            "of its own, or empty this one"
        )


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Gives an empty folder beside `directory` that takes its place when the block ends without an error.

    Whatever stops the block, `directory` is the old set, the new one, or (between two renames) absent; never a mixture.
    Raises UserError where the disk refuses.
    """
    directory = directory.resolve()  # a link to a folder stays one
    staging = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        yield staging
        _flush(staging)
        replaced = staging.with_suffix(".replaced")
        if directory.exists():
            directory.rename(replaced)
        staging.rename(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"data.prepared_dir: cannot write {directory} ({error.strerror or error}); give one that can be written"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_rows(rows: Rows, tasks: Sequence[str], directory: Path) -> None:
    """Arrow files of `datasets` with int32 lists input_ids, labels, position_ids, task_ids: [tokens of the row]."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    task_ids = {task: index for index, task in enumerate(tasks)}
    documents = [document for row in rows for document in row]
    columns = {
        "input_ids": [document.input_ids for document in documents],
        "labels": [document.labels for document in documents],
        "position_ids": [np.arange(len(document)) for document in documents],
        "task_ids": [np.full(len(document), task_ids[document.document.task]) for document in documents],
    }
    ends = pa.array(np.cumsum([0, *(sum(map(len, row)) for row in rows)]), pa.int32())
    arrays = {
        name: pa.ListArray.from_arrays(ends, pa.array(np.concatenate([*parts, []]).astype(np.int32)))
        for name, parts in columns.items()
    }
    table = InMemoryTable(pa.table(arrays))
    num_shards = None if rows else 1  # `datasets` writes no file for no rows, and then cannot read what it wrote
    dataset = Dataset(table, fingerprint=directory.name)  # a given fingerprint, so that bytes repeat
    dataset.save_to_disk(directory, num_shards=num_shards)


def write_items(held_out: Sequence[Encoded], system_prompt: str | None, directory: Path) -> None:
    """items.jsonl: for every held-out document the turns up to its last answer, and that answer."""
    with (directory / ITEMS).open("w", encoding="utf-8") as file:
        for encoded in held_out:
            file.write(json.dumps(_item(encoded, system_prompt), ensure_ascii=False) + "\n")


def _item(encoded: Encoded, system_prompt: str | None) -> dict[str, Any]:
    document = encoded.document
    answer = document.answer_index()
    return {
        "task": document.task,
        "messages": with_system_prompt(document.messages[:answer], system_prompt),
        "answer": document.messages[answer]["content"],
    }


def _flush(directory: Path) -> None:
    """Has everything on the disk before the rename makes it visible."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
