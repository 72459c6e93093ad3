"""Documents into rows: best-fit decreasing, no document cut."""

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths` (tokens, each from 1 to `capacity`), at most `capacity` tokens a row.

    Best-fit decreasing: the longest document first, each into the fullest row that still takes it; documents of
    equal length in the given order. Needs at most 11/9 of the fewest rows, and one (Johnson 1974).
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows with just so many
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
