"""docs/results.md: its tables and pictures are put in from the finished cells, its words are written by hand."""

import re
from pathlib import Path
from typing import Any

from benchmarks.quality.figures import draw
from benchmarks.quality.results import MixedResults
from benchmarks.quality.tables import Compared, all_tables

PAGE = Path("docs/results.md")
PICTURES = Path("docs/results")


def write_page(compared: Compared, speed: dict[str, Any] | None) -> None:
    """Replaces each table between its marks in the page, and all pictures. Raises MixedResults without a whole seed."""
    if not compared.seeds:
        raise MixedResults("no seed has cells of all methods yet; run `python -m benchmarks.quality` first")
    text = PAGE.read_text()
    for name, table in all_tables(compared, speed):
        text = with_table(text, name, table)
    PAGE.write_text(text)
    draw(compared, speed, PICTURES)


def with_table(text: str, name: str, table: str) -> str:
    """The page with what stands between `<!-- NAME -->` and `<!-- end -->` replaced. Raises ValueError without them."""
    marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    replaced, times = marks.subn(lambda found: f"{found[1]}{table}\n{found[2]}", text)
    if times != 1:
        raise ValueError(f"the page has {times} places for the table {name!r}, expected one")
    return replaced
