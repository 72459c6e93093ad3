"""Lines of text files, with a bound: ten megabytes of compressed zeros unpack to one line of ten gigabytes."""

from collections.abc import Iterator
from typing import IO, AnyStr, Generic

from data_prep.user_error import UserError

LONGEST = 2**26  # bytes or characters of one row: a line, a paragraph, a document, an element of an array
TOO_LONG = f"over {LONGEST >> 20} MiB in one row; split it, or look for a missing quote or line end"


class BoundedLines(Generic[AnyStr]):
    """The lines of a file. Raises UserError, before it reads on, where one row's are longer than LONGEST together.

    A row ends where the reader says so, with `end_row`.
    """

    def __init__(self, file: IO[AnyStr], path: str) -> None:
        self._file: IO[AnyStr] = file
        self._path = path
        self._room = LONGEST  # left for the row
        self.row = 1  # the line on which it begins
        self._number = 0

    def __iter__(self) -> Iterator[AnyStr]:
        return self

    def __next__(self) -> AnyStr:
        line = self._file.readline(self._room + 1)
        if not line:
            raise StopIteration
        self._number += 1
        self._room -= len(line)
        if self._room < 0:
            raise UserError(f"{self._path}:{self.row}: {TOO_LONG}")
        return line

    def end_row(self) -> None:
        self._room, self.row = LONGEST, self._number + 1


def numbered_lines(file: IO[AnyStr], path: str) -> Iterator[tuple[int, AnyStr]]:
    """Lines with their numbers, from 1, where each is a row. Raises UserError for one longer than LONGEST."""
    lines = BoundedLines(file, path)
    for line in lines:
        yield lines.row, line
        lines.end_row()
