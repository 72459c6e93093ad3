"""Blocks hold a bounded number of rows and bytes, in order."""

import pytest

from data_prep.sources.blocks import Block, Unreadable, in_blocks


def sizes(rows: list) -> list[int]:
    blocks = list(in_blocks(3, "a.jsonl", True, iter(rows)))
    assert [row for block in blocks for row in block.rows] == rows
    assert {(block.source, block.place, block.by_line) for block in blocks} <= {(3, "a.jsonl", True)}
    return [len(block.rows) for block in blocks]


def test_blocks_of_short_rows_hold_256_rows_and_none_is_lost():
    assert sizes([(number, b"{}") for number in range(600)]) == [256, 256, 88]
    assert sizes([(number, {"a": 1}) for number in range(256)]) == [256]
    assert sizes([]) == []


@pytest.mark.parametrize("make", [bytes, lambda n: {"a": [{"b": "x" * n}]}], ids=["lines", "records"])
def test_blocks_of_long_rows_end_at_two_megabytes(make):
    assert sizes([(number, make(2**20)) for number in range(5)]) == [2, 2, 1]
    assert sizes([(0, make(1)), (1, make(10_000_000)), (2, make(1))]) == [2, 1]


def test_unreadable_rows_stay_in_their_block():
    assert sizes([(0, Unreadable("cut off")), (1, b"{}")]) == [2]


def test_places_are_lines_or_records():
    assert Block(0, "a.jsonl", True, []).origin(7) == "a.jsonl:7"
    assert Block(0, "a.parquet", False, []).origin(7) == "a.parquet[7]"
