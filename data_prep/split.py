"""Splits documents into training and held-out by their hashes. When data is added, a held-out fraction keeps its
documents; with a held-out count, new documents replace some.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.config import DataConfig
from data_prep.duplicates import DUPLICATE, DUPLICATE_OF_HELD_OUT, SAME_LABELS, mark_first_copies
from data_prep.user_error import UserError


@dataclass(frozen=True)
class Split:
    """Ascending indices of documents: for training, held out, and removed, by reason."""

    train: np.ndarray
    held_out: np.ndarray
    removed: dict[str, np.ndarray]


def split_documents(documents: np.ndarray, config: DataConfig) -> Split:
    """Holds out a fraction, or a count per task, of the distinct documents (DOCUMENT [n]); with 0 none.

    No copy of a held-out document is in the training split, under any task, or in the held-out split under the same
    task. Copies within a task's training documents with the same labels are removed too, unless the recipe keeps them;
    copies in different tasks stay.
    Raises UserError if a task has too few distinct documents for the count.
    """
    first = mark_first_copies(documents)
    chosen = _choose(documents, first, config.held_out, config.tasks)
    held_out = chosen & first
    anywhere = _same_text(documents, documents[held_out])
    leaked = anywhere & ~held_out
    drops = config.cleaning.duplicates == "drop"
    repeated = ~mark_first_copies(documents, SAME_LABELS) & ~anywhere if drops else np.zeros(len(documents), bool)
    return Split(
        np.flatnonzero(~anywhere & ~repeated),
        np.flatnonzero(held_out),
        {DUPLICATE: np.flatnonzero(repeated), DUPLICATE_OF_HELD_OUT: np.flatnonzero(leaked)},
    )


def may_be_held_out(digests: np.ndarray, held_out: float | int) -> np.ndarray:
    """Which documents are candidates, bool [n]: with a fraction those it holds out, with a count all, with 0 none.

    digests: first halves of the documents' digests, uint64 [n].
    """
    if isinstance(held_out, float):
        return digests < np.uint64(held_out * 2**64)
    return np.full(len(digests), held_out > 0)


def in_digest_order(documents: np.ndarray, which: np.ndarray) -> np.ndarray:
    """The indices sorted by document digest: an order that mixes tasks and is independent of sources."""
    keys = [documents[name][which] for name in ("task", "piece", "low", "high")]
    return which[np.lexsort(keys)]


def _choose(documents: np.ndarray, first: np.ndarray, held_out: float | int, tasks: Sequence[str]) -> np.ndarray:
    if isinstance(held_out, float):
        return may_be_held_out(documents["high"], held_out)
    chosen = np.zeros(len(documents), bool)
    if not held_out:
        return chosen
    for index, task in enumerate(tasks):
        own = in_digest_order(documents, np.flatnonzero(first & (documents["task"] == index)))
        # all pieces of a split document go to the same side
        digests = documents[own][["high", "low"]]
        starts = np.flatnonzero(np.concatenate([[True], digests[1:] != digests[:-1]])) if len(own) else own
        if len(starts) <= held_out:
            raise UserError(
                f"data.held_out: {held_out} documents per task, but task {task!r} has {len(starts)} distinct ones, of "
                "which at least one must be left for training; lower data.held_out or add documents"
            )
        chosen[own[: starts[held_out]]] = True
    return chosen


def _same_text(documents: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which documents have the same text as a wanted one; bool [documents]."""
    digests = np.unique(wanted[["high", "low"]])
    if not len(digests):
        return np.zeros(len(documents), bool)
    own = documents[["high", "low"]]
    at = np.minimum(np.searchsorted(digests, own), len(digests) - 1)
    return digests[at] == own
