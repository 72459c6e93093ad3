"""How often each training document is drawn: shares by weight or temperature, caps, and a length in epochs or tokens.

Shares are met by counting, not by chance: of D draws task i gets D p_i, rounded so that they add up, and each of its
documents comes once before any comes again.
"""

import bisect

import numpy as np

from data_prep.config import MixingConfig
from data_prep.split import in_order
from data_prep.user_error import UserError


def shares(counts: np.ndarray, tasks: list[str], mixing: MixingConfig) -> np.ndarray:
    """p_i of the draws by task, float64 [tasks]; counts: training documents by task, after caps.

    Weights as they are given, else n_i^(1/T) over their sum (the temperature sampling of mT5 and FLAN), T = 1 where
    none is given.
    """
    if mixing.weights:
        sizes = np.array([mixing.weights[task] for task in tasks])
    else:
        sizes = (counts / counts.max()) ** (1 / (mixing.temperature or 1.0))
    return sizes / sizes.sum()


def draw(documents: np.ndarray, tasks: list[str], mixing: MixingConfig) -> tuple[np.ndarray, np.ndarray]:
    """The draws from the training documents (DOCUMENT [n], at least one a task), in the order of training.

    Returns indices into the documents and how often each had been drawn before, both int64 [draws].
    Raises UserError where no draw is left for a task.
    """
    by_task = [_capped(documents, index, mixing.caps.get(task)) for index, task in enumerate(tasks)]
    share = shares(np.array([len(own) for own in by_task]), tasks, mixing)
    draws = _whole(share * _length(documents, by_task, share, mixing))
    if not draws.all():
        raise UserError(
            f"data.mixing: {draws.sum()} draws in all leave none for task {tasks[draws.argmin()]!r}; raise epochs or "
            "token_budget, or its share"
        )
    drawn = [np.resize(own, number) for own, number in zip(by_task, draws, strict=True)]
    repeats = [np.arange(number) // len(own) for own, number in zip(by_task, draws, strict=True)]
    indices, again = np.concatenate(drawn), np.concatenate(repeats)
    order = _spread(documents, indices, again)
    return indices[order], again[order]


def _capped(documents: np.ndarray, task: int, cap: int | None) -> np.ndarray:
    return in_order(documents, np.flatnonzero(documents["task"] == task))[:cap]


def _length(documents: np.ndarray, by_task: list[np.ndarray], share: np.ndarray, mixing: MixingConfig) -> int:
    """Draws in all. Those of a token budget hold no more tokens, and less than one document a task fewer."""
    if mixing.token_budget is None:
        return round((mixing.epochs or 1.0) * sum(map(len, by_task)))
    # tokens of the first so many documents, by task
    sums = [np.concatenate([[0], np.cumsum(documents["tokens"][own], dtype=np.int64)]) for own in by_task]

    def tokens(length: int) -> int:
        total = 0
        for number, firsts in zip(_whole(share * length).tolist(), sums, strict=True):
            passes, rest = divmod(number, len(firsts) - 1)
            total += passes * int(firsts[-1]) + int(firsts[rest])
        return total

    # a draw has a token at least, so that there are no more draws than tokens
    return bisect.bisect_right(range(mixing.token_budget + 1), mixing.token_budget, key=tokens) - 1


def _whole(parts: np.ndarray) -> np.ndarray:
    """Whole numbers with the same sum, each within one of its part: the largest remainders are rounded up."""
    whole = np.floor(parts).astype(np.int64)
    missing = round(parts.sum()) - whole.sum()
    whole[np.argsort(whole - parts, kind="stable")[:missing]] += 1
    return whole


def _spread(documents: np.ndarray, indices: np.ndarray, again: np.ndarray) -> np.ndarray:
    """An order in which the draws of a document are apart from one another: by a hash of digest and repetition."""
    with np.errstate(over="ignore"):
        keys = documents["high"][indices] ^ (again.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))  # 2^64 / phi
    task, piece, low = (documents[name][indices] for name in ("task", "piece", "low"))
    return np.lexsort((task, piece, low, keys))
