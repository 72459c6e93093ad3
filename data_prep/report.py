"""What `prepare` did, as a table by task."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COLUMNS = ("task", "documents", "held out", "rows", "tokens", "labelled", "share", "cut", "dropped")


@dataclass(frozen=True)
class PrepareReport:
    """The outcome of one preparation; `str()` gives the text that the command prints.

    `manifest` is manifest.json as a dictionary, `seconds` the wall time, `reused` whether the set was there already.
    """

    directory: Path
    manifest: dict[str, Any]
    seconds: float
    reused: bool

    def __str__(self) -> str:
        return "\n".join([self._headline(), *self.table(), *self._totals(), *self._notes()])

    def table(self) -> list[str]:
        """Lines of the table: counts of the training split by task, with held-out documents beside them."""
        lines = [_COLUMNS, *(self._line(task) for task in self.manifest["tasks"])]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return [_align(line, widths) for line in lines]

    def _line(self, task: str) -> tuple[str, ...]:
        train, held_out = (self.manifest["splits"][split]["tasks"][task] for split in ("train", "held_out"))
        labelled = self.manifest["splits"]["train"]["tasks"].values()
        share = train["labelled_tokens"] / sum(counts["labelled_tokens"] for counts in labelled)
        counts = (
            train["documents"],
            held_out["documents"],
            train["rows"],
            train["tokens"],
            train["labelled_tokens"],
        )
        cut = train["truncated"] + held_out["truncated"]
        lost = self.manifest["dropped"][task]
        dropped = f"{sum(lost.values()):,}"
        if lost:
            dropped += " (" + ", ".join(f"{count:,} {reason}" for reason, count in lost.items()) + ")"
        return (task, *(f"{count:,}" for count in counts), f"{share:.1%}", f"{cut:,}", dropped)

    def _headline(self) -> str:
        if self.reused:
            return f"{self.directory} is unchanged and was kept ({self.seconds:.1f} s)"
        return f"{self.directory} was prepared in {self.seconds:.1f} s"

    def _totals(self) -> list[str]:
        seq_len = self.manifest["config"]["seq_len"]
        return [
            f"{split.replace('_', '-')}: {counts['rows']:,} rows of up to {seq_len:,} tokens, {counts['tokens']:,} "
            f"tokens, {counts['fill_rate'] or 0:.1%} filled"
            for split, counts in self.manifest["splits"].items()
        ]

    def _notes(self) -> list[str]:
        return [f"note: {note}" for note in self.manifest["notes"]]


def _align(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:-1], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *numbers, cells[-1]])
