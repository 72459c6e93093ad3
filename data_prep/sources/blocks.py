"""Blocks of a source's rows, which go from the process that reads to those that parse and tokenize."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_ROWS = 256
_SIZE = 2**21  # characters or bytes; a block of long rows holds fewer of them


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that could not be read, and the reason, for error messages."""

    why: str


# what readers yield: the row's number, and a line of JSON, a record, or the reason why there is none
Row = tuple[int, bytes | dict[str, Any] | Unreadable]


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one file or generator, in its order."""

    source: int  # index into data.sources
    place: str  # the file, dataset or generator
    by_line: bool  # whether row numbers are lines, from 1, or records, from 0
    rows: list[Row]
    unread: tuple[str, ...] = ()  # what the file says beside its rows, as in Document.unread

    def origin(self, number: int) -> str:
        """Where a row is: "file:line" or "file[record]"."""
        return f"{self.place}:{number}" if self.by_line else f"{self.place}[{number}]"


def in_blocks(
    source: int, place: str, by_line: bool, rows: Iterator[Row], unread: tuple[str, ...] = ()
) -> Iterator[Block]:
    """Groups rows into blocks of at most 256 rows and about 2 MB."""
    block: list[Row] = []
    size = 0
    for row in rows:
        block.append(row)
        size += _size(row[1])
        if len(block) == _ROWS or size >= _SIZE:
            yield Block(source, place, by_line, block, unread)
            block, size = [], 0
    if block:
        yield Block(source, place, by_line, block, unread)


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8
