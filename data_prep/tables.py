"""Tables of text, for a terminal and for Markdown files."""

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 10_000  # characters; cells are never wrapped or cut


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns aligned with blanks. left: indices of the left-aligned columns; the others are right-aligned."""
    return "\n".join(_lines(head, rows, left, None))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """The same as a Markdown table, readable as plain text too."""
    head, *rows = ([cell.replace("|", r"\|") for cell in cells] for cells in (head, *rows))
    names, rule, *lines = _lines(head, rows, left, box.MARKDOWN)
    dashes = (part if index in left else f"{part[:-1]}:" for index, part in enumerate(rule.strip("|").split("|")))
    return "\n".join([names, f"|{'|'.join(dashes)}|", *lines])


def _lines(
    head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int], border: box.Box | None
) -> list[str]:
    table = Table(box=border, pad_edge=border is not None, padding=(0, 1) if border else (0, 2, 0, 0))
    for index, name in enumerate(head):
        table.add_column(Text(name), justify="left" if index in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    file = io.StringIO()
    Console(file=file, width=_WIDTH, color_system=None).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]
