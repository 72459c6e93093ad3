"""Rows of tables as text: CSV, and what CSV and TSV have in common."""

import codecs
import csv
import io
import sys
from collections.abc import Iterator
from typing import BinaryIO

from data_prep.sources.blocks import Row, Unreadable
from data_prep.sources.lines import BoundedLines
from data_prep.sources.text import ZERO_BYTE, first_repeated, no_utf8
from data_prep.user_error import UserError

_OTHERS = {  # what else can stand between columns, and the remedy
    "\t": "tabs; set the source's `format: tsv`",
    ",": "commas; set the source's `format: csv`",
    ";": "semicolons; save the file as CSV with commas, or as JSON lines",
    "|": "bars; save the file as CSV with commas, or as JSON lines",
}


def refuse_other_delimiters(start: bytes, path: str, delimiter: str) -> None:
    """Raises UserError if a table begins with a header that has no delimiter, but another one."""
    lines = start.removeprefix(codecs.BOM_UTF8).splitlines()
    line, header = next(((i, line.decode(errors="replace")) for i, line in enumerate(lines, 1) if line), (1, ""))
    other = next((name for name in _OTHERS if name in header), None)
    if other is not None and delimiter not in header:
        raise UserError(f"{path}:{line}: the header's columns are separated by {_OTHERS[other]}")


def read_table(file: BinaryIO, path: str, delimiter: str) -> Iterator[Row]:
    """Records of a CSV file with a header, or a TSV file quoted like one, numbered by their first line.

    Raises UserError if it is damaged.
    """
    csv.field_size_limit(sys.maxsize)  # applies to all readers of the process; the default is 128 KiB
    # Bytes that are not UTF-8 become lone surrogates, so that only their rows are bad.
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    lines = BoundedLines(text, path)
    header: list[str] = []
    try:
        for values in csv.reader(lines, delimiter=delimiter, strict=True):
            if not header:
                header = checked_header(values, f"{path}:{lines.row}")
            elif values:
                why = why_not_a_row(values, header)
                yield lines.row, Unreadable(why) if why else dict(zip(header, values, strict=True))
            lines.end_row()
    except csv.Error as error:
        raise UserError(f"{path}:{lines.row}: not a table ({error}); correct the row or its quotes") from error


def checked_header(names: list[str], origin: str) -> list[str]:
    """The names of a table's columns. Raises UserError for repeated ones and for bytes that are not UTF-8."""
    if (name := first_repeated(names)) is not None:
        raise UserError(f"{origin}: column {name!r} is repeated; rename one")
    if byte := _escaped_byte(names):
        raise UserError(f"{origin}: {no_utf8(byte)}")
    return names


def why_not_a_row(values: list[str], header: list[str]) -> str | None:
    """Why these values are not a row of the table; None if they are."""
    if len(values) != len(header):
        return f"{len(values)} values in {len(header)} columns; correct the row or its quotes"
    if byte := _escaped_byte(values):
        return no_utf8(byte)
    return ZERO_BYTE if any("\0" in value for value in values) else None


def _escaped_byte(values: list[str]) -> int | None:
    """The first byte that was not UTF-8 and was escaped when decoding, if any."""
    text = "".join(values)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start].encode(errors="surrogateescape")[0]
    return None
