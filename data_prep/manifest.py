"""manifest.json: what a prepared set holds and what it was made from."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.config import DataConfig
from data_prep.encode import Dropped, Encoded
from data_prep.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "held_out")

Rows = list[list[Encoded]]


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest in `directory`, None where there is none.

    Raises UserError where it cannot be read or is of another format.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.prepared_dir: cannot read {path} ({error}); remove the folder and run `teamlora prepare RECIPE`"
        ) from error
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(
            f"data.prepared_dir: {path} has format version {found}, expected {FORMAT_VERSION}; remove the folder and "
            "run `teamlora prepare RECIPE`"
        )
    return manifest


def write_manifest(manifest: dict[str, Any], directory: Path) -> None:
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def describe(
    config: DataConfig,
    tasks: Sequence[str],
    rows: dict[str, Rows],
    dropped: Sequence[Dropped],
    made_from: dict[str, Any],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The manifest of a set with these rows (by split) and dropped documents.

    `made_from` holds key, tokenizer and sources as fingerprint.py gives them.
    """
    return {
        "format_version": FORMAT_VERSION,
        **made_from,
        "tasks": list(tasks),
        "splits": {split: _describe_split(rows[split], tasks, config.seq_len) for split in SPLITS},
        "dropped": {task: _reasons(dropped, task) for task in tasks},
        "notes": list(notes),
        "config": config.model_dump(mode="json"),
    }


def _describe_split(rows: Rows, tasks: Sequence[str], seq_len: int) -> dict[str, Any]:
    tokens = sum(len(document) for row in rows for document in row)
    return {
        "rows": len(rows),
        "tokens": tokens,
        "fill_rate": round(tokens / (len(rows) * seq_len), 4) if rows else None,
        "tasks": {task: _describe_task(rows, task) for task in tasks},
    }


def _describe_task(rows: Rows, task: str) -> dict[str, int]:
    """Counts of one task; `rows` are those that hold some of it, so that a row may count for several tasks."""
    by_row = [[document for document in row if document.document.task == task] for row in rows]
    documents = [document for row in by_row for document in row]
    return {
        "documents": len(documents),
        "truncated": sum(document.truncated for document in documents),
        "rows": sum(bool(row) for row in by_row),
        "tokens": sum(map(len, documents)),
        "labelled_tokens": sum(document.labelled_tokens for document in documents),
    }


def _reasons(dropped: Sequence[Dropped], task: str) -> dict[str, int]:
    return dict(sorted(Counter(d.reason for d in dropped if d.document.task == task).items()))
