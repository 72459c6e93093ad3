"""Packing: whole documents, each exactly once, in few rows."""

import math
import random

import numpy as np
import pytest

from data_prep.packing import pack, pack_in_windows


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


def lognormal_lengths(count: int, capacity: int = 2048, seed: int = 0) -> np.ndarray:
    """int32 [count]: median 200, sigma 1, cut at the capacity, as instruction data is."""
    lengths = np.random.default_rng(seed).lognormal(math.log(200), 1, count)
    return np.clip(np.ceil(lengths), 1, capacity).astype(np.int32)


@pytest.mark.parametrize(
    "lengths",
    [
        lognormal_lengths(20_000),
        np.full(3000, 2048, np.int32),
        np.ones(5000, np.int32),
        np.zeros(0, np.int32),
        np.array([7], np.int32),
    ],
    ids=["lognormal", "all full", "all short", "none", "one"],
)
def test_windows_hold_every_document_once_and_no_row_is_overfull(lengths):
    rows = [row for stretch in pack_in_windows(lengths, 2048) for row in stretch]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and lengths[row].sum() <= 2048 for row in rows)


@pytest.mark.parametrize("seed", range(3))
def test_windows_fill_rows_of_an_instruction_mix_to_98_percent(seed):
    lengths = lognormal_lengths(20_000, seed=seed)
    rows = sum(map(len, pack_in_windows(lengths, 2048)))
    assert lengths.sum() / (rows * 2048) >= 0.98


@pytest.mark.parametrize(("capacity", "count"), [(2048, 40_000), (16_384, 40_000), (64, 40_000)])
def test_a_window_holds_consecutive_documents_and_a_bounded_number_of_tokens(capacity, count):
    lengths = lognormal_lengths(count, capacity)
    stretches = [sorted(index for row in rows for index in row) for rows in pack_in_windows(lengths, capacity)]
    assert [index for stretch in stretches for index in stretch] == list(range(count))
    assert len(stretches) > 1
    bound = max(2**20, 256 * capacity)
    assert all(bound - capacity < lengths[stretch].sum() <= bound for stretch in stretches[:-1])
    assert lengths[stretches[-1]].sum() <= bound


def test_rows_of_a_window_are_sorted_by_their_longest_documents():
    lengths = lognormal_lengths(20_000)
    for stretch in pack_in_windows(lengths, 2048):
        longest = [row[np.argmax(lengths[row])] for row in stretch]
        assert longest == sorted(longest)
