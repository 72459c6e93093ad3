"""Packs documents into rows by best-fit decreasing, window by window, without cutting any."""

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

_WINDOW_ROWS = 256  # minimum; so about one row in hundreds stays half empty
_WINDOW_TOKENS = 2**20  # minimum


def pack_in_windows(lengths: np.ndarray, capacity: int) -> Iterator[list[list[int]]]:
    """Rows of indices into `lengths` (see pack), window by window, sorted within each.

    A window is as many documents as fill about 256 rows, which bounds memory, and time per document, for any number of
    documents.
    """
    window = max(_WINDOW_TOKENS, _WINDOW_ROWS * capacity)
    ends = np.cumsum(lengths, dtype=np.int64)
    start = 0
    while start < len(lengths):
        reached = ends[start] - lengths[start] + window
        end = max(start + 1, int(np.searchsorted(ends, reached, side="right")))
        rows = pack(lengths[start:end].tolist(), capacity)
        yield [[start + index for index in row] for row in sorted(rows)]
        start = end


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths` (tokens, each from 1 to `capacity`), with at most `capacity` tokens per row.

    Best-fit decreasing: documents from longest to shortest, equal ones in the given order, each into the fullest row
    that still has space. Needs at most 11/9 of the minimum number of rows, plus one (Johnson 1974).
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows with exactly that many
    free_sizes: list[int] = []  # keys of open_rows, sorted
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        at = bisect.bisect_left(free_sizes, length)
        if at == len(free_sizes):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free = free_sizes[at]
            row = open_rows[free].pop()
            if not open_rows[free]:
                del open_rows[free], free_sizes[at]
        rows[row].append(document)
        left = free - length
        if left and left not in open_rows:
            bisect.insort(free_sizes, left)
        if left:
            open_rows.setdefault(left, []).append(row)
    return rows
