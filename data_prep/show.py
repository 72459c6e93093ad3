"""Prints rows of a prepared set as text, with learned tokens in color, or in brackets if not on a terminal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import IGNORED
from data_prep.manifest import read_manifest
from data_prep.terminal_text import without_control_codes


def show(directory: Path, tokenizer: Any, count: int) -> None:
    """Prints the first `count` rows of the training split by document, and how many tokens are learned."""
    from datasets import load_from_disk
    from rich.console import Console

    console = Console(highlight=False, emoji=False, soft_wrap=True)
    manifest = read_manifest(directory)
    assert manifest is not None, f"no prepared set in {directory}"  # callers have just prepared or found one
    tasks = manifest["tasks"]
    for index, row in enumerate(load_from_disk(directory / "train").with_format("numpy").take(count)):
        console.print(f"row {index}: {len(row['input_ids'])} tokens", style="bold")
        starts = np.flatnonzero(row["position_ids"] == 0)
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            ids, learned = row["input_ids"][start:end], row["labels"][start:end] != IGNORED
            console.print(
                f"[{tasks[row['task_ids'][start]]}] {learned.sum()} of {len(ids)} tokens learned",
                style="cyan",
                markup=False,
            )
            for text, is_learned in _stretches(tokenizer, ids, learned):
                _write(console, text, is_learned)
            console.print()


def _stretches(tokenizer: Any, ids: np.ndarray, learned: np.ndarray) -> Iterator[tuple[str, bool]]:
    """Text of each run of tokens that are all learned or all not."""
    edges = np.flatnonzero(learned[1:] != learned[:-1]) + 1
    for part, flags in zip(np.split(ids, edges), np.split(learned, edges), strict=True):
        text = tokenizer.decode(part, clean_up_tokenization_spaces=False)
        yield without_control_codes(text), bool(flags[0])


def _write(console: Any, text: str, is_learned: bool) -> None:
    if is_learned and not console.is_terminal:
        text = f"⟦{text}⟧"
    console.print(text, style="black on green" if is_learned else None, markup=False, end="")
