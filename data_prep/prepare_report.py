"""What `prepare` did: a table by task for the terminal, and report.md beside the set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.plots import PLOTS

REPORT = "report.md"
_COLUMNS = ("task", "documents", "held out", "rows", "tokens", "labelled", "share", "cut", "removed")


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
        if self.reused:
            headline = f"{self.directory} is unchanged and was kept ({self.seconds:.1f} s)"
        else:
            headline = f"{self.directory} was prepared in {self.seconds:.1f} s"
        more = f"more: {self.directory / REPORT}"
        return "\n".join([headline, *table(self.manifest), *_totals(self.manifest), *_notes(self.manifest), more])


def table(manifest: dict[str, Any]) -> list[str]:
    """Lines of the table: counts of the training split by task, held-out documents and what was removed beside them."""
    lines = [_COLUMNS, *(_line(manifest, task) for task in manifest["tasks"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [_align(line, widths) for line in lines]


def write_report(manifest: dict[str, Any], directory: Path) -> None:
    """report.md: all that the table says, shares, forms, and the first places of everything removed."""
    parts = [
        ["# Prepared set", "", *_totals(manifest), *_notes(manifest), ""],
        ["## By task", "", *_markdown([_COLUMNS, *(_line(manifest, task) for task in manifest["tasks"])]), ""],
        ["## Shares of the training split", "", *_markdown(_shares(manifest)), ""],
        *([f"![{name}]({file})", ""] for name, file in PLOTS.items()),
        ["## Sources", "", *_sources(manifest), ""],
        ["## Removed", "", *_removed(manifest)],
    ]
    (directory / REPORT).write_text("\n".join(line for part in parts for line in part) + "\n", encoding="utf-8")


def _line(manifest: dict[str, Any], task: str) -> tuple[str, ...]:
    train, held_out = (manifest["splits"][split]["tasks"][task] for split in ("train", "held_out"))
    counts = (train["documents"], held_out["documents"], train["rows"], train["tokens"], train["labelled_tokens"])
    cut = train["truncated"] + held_out["truncated"]
    lost = {reason: found["documents"] for reason, found in manifest["removed"][task].items()}
    removed = f"{sum(lost.values()):,}"
    if lost:
        removed += " (" + ", ".join(f"{count:,} {reason}" for reason, count in lost.items()) + ")"
    share = _share(manifest, task, "labelled_tokens")
    return (task, *(f"{count:,}" for count in counts), f"{share:.1%}", f"{cut:,}", removed)


def _shares(manifest: dict[str, Any]) -> list[tuple[str, ...]]:
    lines = [("task", "documents", "rows", "tokens", "labelled tokens", "draws a document")]
    for task in manifest["tasks"]:
        shares = (_share(manifest, task, what) for what in ("documents", "rows", "tokens", "labelled_tokens"))
        draws = manifest["splits"]["train"]["tasks"][task]["documents"] / manifest["different_documents"][task]
        lines.append((task, *(f"{share:.2%}" for share in shares), f"{draws:.2f}"))
    return lines


def _share(manifest: dict[str, Any], task: str, what: str) -> float:
    tasks = manifest["splits"]["train"]["tasks"]
    return tasks[task][what] / sum(counts[what] for counts in tasks.values())


def _totals(manifest: dict[str, Any]) -> list[str]:
    seq_len = manifest["config"]["seq_len"]
    return [
        f"{split.replace('_', '-')}: {counts['rows']:,} rows of up to {seq_len:,} tokens, {counts['tokens']:,} "
        f"tokens, {counts['fill_rate'] or 0:.1%} filled"
        for split, counts in manifest["splits"].items()
    ]


def _notes(manifest: dict[str, Any]) -> list[str]:
    return [f"note: {note}" for note in manifest["notes"]]


def _sources(manifest: dict[str, Any]) -> list[str]:
    lines = []
    for index, source in enumerate(manifest["config"]["sources"]):
        forms = manifest["forms"].get(f"data.sources.{index}", {})
        held = ", ".join(f"{count:,} {form}" for form, count in forms.items()) or "no record"
        where = source.get("path") or source.get("name") or source.get("generator") or source["task"]
        lines.append(f"- {source['task']}: {source['type']} `{where}`: {held}")
    return lines


def _removed(manifest: dict[str, Any]) -> list[str]:
    lines = []
    for task, reasons in manifest["removed"].items():
        for reason, found in reasons.items():
            lines.append(f"- {task}: {found['documents']:,} {reason}")
            lines += [f"  - {place}" for place in found["first"]]
    return lines or ["Nothing."]


def _markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return [head, "|" + "---|" * len(lines[0]), *rest]


def _align(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:-1], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *numbers, cells[-1]])
