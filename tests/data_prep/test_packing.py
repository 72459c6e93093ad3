"""Packing: whole documents, each exactly once, in few rows."""

import random

import pytest

from data_prep.packing import pack


def random_lengths(seed: int, count: int, capacity: int) -> list[int]:
    """Mostly short documents, as in instruction data, with some up to the capacity."""
    rng = random.Random(seed)
    return [min(capacity, 1 + int(rng.expovariate(5 / capacity))) for _ in range(count)]


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """The optimum, by trying every row for every document."""

    def place(index: int, free: tuple[int, ...]) -> int:
        if index == len(lengths):
            return len(free)
        length = lengths[index]
        fits = [i for i, space in enumerate(free) if space >= length]
        choices = [(*free[:i], free[i] - length, *free[i + 1 :]) for i in fits]
        return min(place(index + 1, choice) for choice in [*choices, (*free, capacity - length)])

    return place(0, ())


@pytest.mark.parametrize(("count", "capacity"), [(0, 10), (1, 10), (200, 2), (1000, 64), (3000, 2048)])
@pytest.mark.parametrize("seed", range(3))
def test_every_document_is_in_one_row_whole_and_no_row_is_overfull(seed, count, capacity):
    lengths = random_lengths(seed, count, capacity)
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(count))
    assert all(row and sum(lengths[index] for index in row) <= capacity for row in rows)


@pytest.mark.parametrize("seed", range(10))
def test_rows_stay_within_johnsons_bound_of_the_optimum(seed):
    lengths = random.Random(seed).choices(range(1, 11), k=8)
    assert len(pack(lengths, 10)) <= 11 / 9 * fewest_rows(lengths, 10) + 1


@pytest.mark.parametrize("seed", range(3))
def test_many_short_documents_fill_rows_almost_wholly(seed):
    lengths = random_lengths(seed, 3000, 2048)
    lower_bound = -(-sum(lengths) // 2048)
    assert len(pack(lengths, 2048)) <= 1.01 * lower_bound + 1


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([10, 10], [[0], [1]]),
        ([3, 7, 4, 6], [[1, 0], [3, 2]]),
        ([5, 5, 5, 5], [[0, 1], [2, 3]]),
        ([7, 6, 3], [[0, 2], [1]]),  # the fullest row that takes it, not the last
        ([6, 7, 3], [[1, 2], [0]]),
    ],
    ids=["full", "pairs", "ties in order", "best fit", "longest first"],
)
def test_longest_document_goes_first_and_into_the_fullest_row(lengths, rows):
    assert pack(lengths, 10) == rows
