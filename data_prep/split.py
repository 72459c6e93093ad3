"""The held-out split: by each document's own hash. A fraction stays as it is when data is added; of a count, new
documents replace some.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.config import DataConfig
from data_prep.duplicates import DUPLICATE, DUPLICATE_OF_HELD_OUT, SAME_LESSON, first_of_copies
from data_prep.user_error import UserError


@dataclass(frozen=True)
class Split:
    """Indices into the documents, ascending, and what was taken out: indices by reason."""

    train: np.ndarray
    held_out: np.ndarray
    removed: dict[str, np.ndarray]


def split_documents(documents: np.ndarray, config: DataConfig) -> Split:
    """Keeps a fraction, or a count per task, of the different documents (DOCUMENT [n]) from training.

    No held-out document is in the training split, under any task, nor twice in the held-out one under the same task.
    Copies within a task's training documents, of which the same is learned, go as well, unless the recipe keeps them;
    copies in different tasks stay.
    Raises UserError where a task has too few different documents for the count.
    """
    first = first_of_copies(documents)
    chosen = _choose(documents, first, config.held_out, config.tasks)
    held_out = chosen & first
    anywhere = _in(documents, documents[held_out])
    leaked = anywhere & ~held_out
    drops = config.cleaning.duplicates == "drop"
    repeated = ~first_of_copies(documents, SAME_LESSON) & ~anywhere if drops else np.zeros(len(documents), bool)
    return Split(
        np.flatnonzero(~anywhere & ~repeated),
        np.flatnonzero(held_out),
        {DUPLICATE: np.flatnonzero(repeated), DUPLICATE_OF_HELD_OUT: np.flatnonzero(leaked)},
    )


def may_be_held_out(digests: np.ndarray, held_out: float | int) -> np.ndarray:
    """Which documents a fraction holds out, by the first half of their digests, uint64 [n]; with a count any may be."""
    if isinstance(held_out, float):
        return digests < np.uint64(held_out * 2**64)
    return np.ones(len(digests), bool)


def in_order(documents: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Those indices in the order of the documents' digests, which is that of no source and mixes the tasks."""
    keys = [documents[name][which] for name in ("task", "piece", "low", "high")]
    return which[np.lexsort(keys)]


def _choose(documents: np.ndarray, first: np.ndarray, held_out: float | int, tasks: Sequence[str]) -> np.ndarray:
    if isinstance(held_out, float):
        return may_be_held_out(documents["high"], held_out)
    chosen = np.zeros(len(documents), bool)
    for index, task in enumerate(tasks):
        own = in_order(documents, np.flatnonzero(first & (documents["task"] == index)))
        # the pieces of a split document are on the same side
        digests = documents[own][["high", "low"]]
        starts = np.flatnonzero(np.concatenate([[True], digests[1:] != digests[:-1]])) if len(own) else own
        if len(starts) <= held_out:
            raise UserError(
                f"data.held_out: {held_out} documents per task, but task {task!r} has {len(starts)} different ones, of "
                "which at least one must be left to train on; lower data.held_out or add documents"
            )
        chosen[own[: starts[held_out]]] = True
    return chosen


def _in(documents: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which documents have the text of a wanted one; bool [documents]."""
    digests = np.unique(wanted[["high", "low"]])
    if not len(digests):
        return np.zeros(len(documents), bool)
    own = documents[["high", "low"]]
    at = np.minimum(np.searchsorted(digests, own), len(digests) - 1)
    return digests[at] == own
