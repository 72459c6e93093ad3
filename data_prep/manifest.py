"""manifest.json: the content of a prepared set and what it was made from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import DataConfig
from data_prep.user_error import UserError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "held_out")
_BINS = 32  # per histogram


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest in `directory`; None if there is none.

    Raises UserError if it cannot be read or has another format version.
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


@dataclass(frozen=True)
class WrittenRows:
    """Counts of the rows written for one split."""

    row_tokens: np.ndarray  # int64 [rows]
    task_rows: np.ndarray  # int64 [tasks]: rows that hold a document of the task


def describe_split(
    documents: np.ndarray, order: np.ndarray, written: WrittenRows, config: DataConfig
) -> dict[str, Any]:
    """The manifest's entry on one split. documents: DOCUMENT [n]; order: indices of those drawn."""
    tokens, rows = int(written.row_tokens.sum()), len(written.row_tokens)
    tasks = documents["task"][order]
    by_task = (documents[order[tasks == index]] for index in range(len(config.tasks)))
    return {
        "rows": rows,
        "tokens": tokens,
        "fill_rate": round(tokens / (rows * config.seq_len), 4) if rows else None,
        "row_tokens": _histogram(written.row_tokens, config.seq_len),
        "tasks": {
            task: _describe_task(own, int(task_rows), config.seq_len)
            for task, own, task_rows in zip(config.tasks, by_task, written.task_rows, strict=True)
        },
    }


def bin_edges(seq_len: int) -> np.ndarray:
    """Bin edges of the histograms, float64 [bins + 1]: equal bins from 0 to seq_len tokens."""
    return np.linspace(0, seq_len, min(_BINS, seq_len) + 1)


def _describe_task(documents: np.ndarray, rows: int, seq_len: int) -> dict[str, Any]:
    """Counts of one task; `rows` hold at least one of its documents, so one row may count for several tasks."""
    return {
        "documents": len(documents),
        "truncated": int(documents["cut"].sum()),
        "rows": rows,
        "tokens": int(documents["tokens"].sum()),
        "labelled_tokens": int(documents["labelled"].sum()),
        "lengths": _histogram(documents["tokens"], seq_len),
    }


def _histogram(tokens: np.ndarray, seq_len: int) -> Sequence[int]:
    return np.histogram(tokens, bin_edges(seq_len))[0].tolist()
