"""Rows of TSV files: tabs and line ends separate, and quotes are text, except around a cell that can only be quoted."""

import io
import re
from collections.abc import Iterator
from typing import BinaryIO

from data_prep.sources.blocks import Row, Unreadable
from data_prep.sources.delimited import checked_header, why_not_a_row
from data_prep.sources.lines import numbered_lines
from data_prep.user_error import UserError

_QUOTED = re.compile(r'"(?:[^"]++|"")*+"')
_TO_QUOTE = re.compile(r'(?:[^"]++|"")*+')  # from within quotes to the quote that ends them, or to the line's end


def read_tsv(file: BinaryIO, path: str) -> Iterator[Row]:
    """Records of a TSV file whose header is not quoted, numbered by line.

    Raises UserError for a cell that may be quoted and span lines: with its lines as rows, text would be learned that
    nobody wrote, and with a lone quote as the start of such a cell, rows would vanish.
    """
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=None)
    header: list[str] = []
    open_quotes = _OpenQuotes(path)
    for number, line in numbered_lines(text, path):
        line = line.removesuffix("\n")
        if not header:
            header = checked_header(line.split("\t"), f"{path}:{number}") if line else []
            continue
        cells = _cells(line, len(header))
        open_quotes.check(number, line, is_row=len(cells) == len(header) > 1 and bool(cells[0].strip()))
        if line:
            why = why_not_a_row(cells, header)
            yield number, Unreadable(why) if why else dict(zip(header, cells, strict=True))


def _cells(line: str, columns: int) -> list[str]:
    cells = line.split("\t")
    if '"' not in line:
        return cells
    if len(cells) != columns and len(with_tabs := _split(line)[0]) == columns:
        cells = with_tabs
    return [_without_quotes(cell) for cell in cells]


def _split(line: str) -> tuple[list[str], bool]:
    """The cells if quotes may hold tabs, and whether a cell begins with quotes that the line does not end."""
    cells: list[str] = []
    opens, at = False, 0
    while True:
        end = at
        if line.startswith('"', at):
            quote = _end_of_quotes(line, at + 1)
            opens |= quote == len(line)
            end = quote if quote < len(line) and _ends_cell(line, quote) else at
        tab = line.find("\t", end)
        if tab < 0:
            return [*cells, line[at:]], opens
        cells.append(line[at:tab])
        at = tab + 1


def _without_quotes(cell: str) -> str:
    """The cell's text. "Hello" stays as it is: writers quote only what holds a quote or a tab, or nothing."""
    if not _QUOTED.fullmatch(cell):
        return cell
    inner = cell[1:-1]
    return inner.replace('""', '"') if '"' in inner or "\t" in inner or not inner else cell


class _OpenQuotes:
    """Looks for quotes at the start of a cell that end a cell of a later line."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._line = 0  # where quotes are open; 0: nowhere
        self._rows_only = True  # whether each line from there on is a row by itself

    def check(self, number: int, line: str, is_row: bool) -> None:
        """is_row: whether the line is a row by itself, beyond doubt."""
        if self._line:
            self._rows_only &= is_row
            end = _end_of_quotes(line, 0)
            if end < len(line):
                if _ends_cell(line, end) and not self._rows_only:
                    raise UserError(
                        f"{self._path}:{self._line}: a cell in quotes over several lines, or a lone quote; a TSV has "
                        "one row per line, save the file as CSV or as JSON lines"
                    )
                self._line = 0
        if not self._line and '"' in line and _split(line)[1]:
            self._line, self._rows_only = number, is_row


def _end_of_quotes(line: str, start: int) -> int:
    found = _TO_QUOTE.match(line, start)
    return found.end() if found else start


def _ends_cell(line: str, quote: int) -> bool:
    return line[quote + 1 : quote + 2] in ("", "\t")
