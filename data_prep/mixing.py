"""How often each training document is drawn: shares by weight or temperature, caps, and a length in epochs or tokens.

Shares are exact, not random: of D draws, task i gets D p_i, rounded so that they sum to D, and each of its documents is
drawn once before any is drawn again.
"""

import bisect

import numpy as np

from data_prep.config import MixingConfig
from data_prep.resource_limits import available_memory
from data_prep.split import in_digest_order
from data_prep.user_error import UserError

_BYTES_PER_DRAW = 80  # two indices, the keys that they are sorted by, and the order


def task_shares(counts: np.ndarray, tasks: list[str], mixing: MixingConfig) -> np.ndarray:
    """Shares p_i of the draws, float64 [tasks]. counts: training documents per task, after caps.

    Proportional to the weights if given, else to n_i^(1/T) (temperature sampling as in mT5 and FLAN), by default with
    T = 1.
    """
    if mixing.weights:
        sizes = np.array([mixing.weights[task] for task in tasks])
    else:
        sizes = (counts / counts.max()) ** (1 / (mixing.temperature or 1.0))
    return sizes / sizes.sum()


def draw(documents: np.ndarray, tasks: list[str], mixing: MixingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Draws from the training documents (DOCUMENT [n], at least one per task), in training order.

    Returns indices into the documents and how often each was drawn before, both int64 [draws].
    Raises UserError if a task gets no draw.
    """
    by_task = [_capped(documents, index, mixing.caps.get(task)) for index, task in enumerate(tasks)]
    share = task_shares(np.array([len(own) for own in by_task]), tasks, mixing)
    draws = _rounded_to_sum(share * _total_draws(documents, by_task, share, mixing))
    if not draws.all():
        raise UserError(
            f"data.mixing: {draws.sum()} draws in total leave none for task {tasks[draws.argmin()]!r}; raise epochs or "
            "token_budget, or its share"
        )
    _refuse_beyond_memory(int(draws.sum()), sum(map(len, by_task)))
    drawn = [np.resize(own, number) for own, number in zip(by_task, draws, strict=True)]
    repeats = [np.arange(number) // len(own) for own, number in zip(by_task, draws, strict=True)]
    indices, again = np.concatenate(drawn), np.concatenate(repeats)
    order = _spread_repeats(documents, indices, again)
    return indices[order], again[order]


def _refuse_beyond_memory(draws: int, documents: int) -> None:
    """Raises UserError where the order of all draws does not fit into memory."""
    needed, free = draws * _BYTES_PER_DRAW, available_memory()
    if needed > free:
        raise UserError(
            f"data.mixing: {draws:,} draws from {documents:,} documents need {needed / 2**30:.1f} GiB of memory to be "
            f"put in order, and {free / 2**30:.1f} GiB are free; lower epochs or token_budget"
        )


def _capped(documents: np.ndarray, task: int, cap: int | None) -> np.ndarray:
    return in_digest_order(documents, np.flatnonzero(documents["task"] == task))[:cap]


def _total_draws(documents: np.ndarray, by_task: list[np.ndarray], share: np.ndarray, mixing: MixingConfig) -> int:
    """Total number of draws. With a token budget they hold at most that many tokens, and at most one document per task
    less.
    """
    if mixing.token_budget is None:
        return round((mixing.epochs or 1.0) * sum(map(len, by_task)))
    # per task: tokens of its first 0, 1, 2, ... documents
    sums = [np.concatenate([[0], np.cumsum(documents["tokens"][own], dtype=np.int64)]) for own in by_task]

    def tokens(length: int) -> int:
        total = 0
        for number, firsts in zip(_rounded_to_sum(share * length).tolist(), sums, strict=True):
            passes, rest = divmod(number, len(firsts) - 1)
            total += passes * int(firsts[-1]) + int(firsts[rest])
        return total

    # a draw has at least one token, so there are at most as many draws as tokens
    return bisect.bisect_right(range(mixing.token_budget + 1), mixing.token_budget, key=tokens) - 1


def _rounded_to_sum(parts: np.ndarray) -> np.ndarray:
    """Whole numbers with the same sum, each less than one from its part: the largest remainders are rounded up."""
    whole = np.floor(parts).astype(np.int64)
    missing = round(parts.sum()) - whole.sum()
    whole[np.argsort(whole - parts, kind="stable")[:missing]] += 1
    return whole


def _spread_repeats(documents: np.ndarray, indices: np.ndarray, again: np.ndarray) -> np.ndarray:
    """An order that spreads the repeats of a document: by a hash of its digest and the number of the repeat."""
    with np.errstate(over="ignore"):
        keys = documents["high"][indices] ^ (again.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))  # 2^64 / phi
    task, piece, low = (documents[name][indices] for name in ("task", "piece", "low"))
    return np.lexsort((task, piece, low, keys))
