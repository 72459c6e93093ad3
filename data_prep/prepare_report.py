"""The report of a preparation: a table per task for the terminal, and report.md in the prepared set."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.plots import PLOTS
from data_prep.tables import markdown_table, text_table

REPORT = "report.md"
_COLUMNS = ("task", "documents", "held out", "rows", "tokens", "labelled", "share", "cut", "removed")
_SHARE_COLUMNS = ("task", "documents", "rows", "tokens", "labelled tokens", "draws per document")
_LEFT = (0, len(_COLUMNS) - 1)  # left-aligned columns

_LISTED = 100  # names of fields that are not read, per source, in report.md
_LONGEST = 80  # characters of such a name


@dataclass(frozen=True)
class PrepareReport:
    """The outcome of one preparation; `str()` gives the text that the command prints.

    `manifest` is the content of manifest.json, `seconds` the wall time, `reused` whether the set was already there.
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
        table = text_table(_COLUMNS, _counts(self.manifest), _LEFT)
        more = f"more: {self.directory / REPORT}"
        return "\n".join([headline, table, *_facts(self.manifest), more])


def write_report(manifest: dict[str, Any], directory: Path) -> None:
    """Writes report.md: the printed table, shares, forms, and the first places of everything removed."""
    parts = [
        ["# Prepared set", "", *_facts(manifest), ""],
        ["## By task", "", markdown_table(_COLUMNS, _counts(manifest), _LEFT), ""],
        ["## Shares of the training split", "", markdown_table(_SHARE_COLUMNS, _shares(manifest)), ""],
        *([f"![{name}]({file})", ""] for name, file in PLOTS.items()),
        ["## Sources", "", *_sources(manifest), ""],
        ["## Removed", "", *_removed(manifest)],
    ]
    (directory / REPORT).write_text("\n".join(line for part in parts for line in part) + "\n", encoding="utf-8")


def note_on_unread(counts: Mapping[str, int], most: int = 8) -> list[str]:
    """What is not read of the records of a source: a line with the most frequent fields; none if all is read."""
    frequent = sorted(counts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{_shown(name)} in {count:,} row{'s'[: count > 1]}" for name, count in frequent[:most])
    more = f" and {len(counts) - most:,} more (all are in manifest.json)" if len(counts) > most else ""
    return [f"not read: {listed}{more}"] if counts else []


def _shown(name: str) -> str:
    """A name from a record, short enough for one line."""
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."


def _counts(manifest: dict[str, Any]) -> list[tuple[str, ...]]:
    """Per task: counts of the training split, held-out documents, and what was removed."""
    return [_counts_of_task(manifest, task) for task in manifest["tasks"]]


def _counts_of_task(manifest: dict[str, Any], task: str) -> tuple[str, ...]:
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
    lines: list[tuple[str, ...]] = []
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


def _facts(manifest: dict[str, Any]) -> list[str]:
    """Totals, the tokens that end learned turns, and notes."""
    ends = manifest.get("learned_ends")  # absent in sets of earlier versions
    learned = [f"learned end: {', '.join(ends)}"] if ends else []
    return [*_totals(manifest), *learned, *(f"note: {note}" for note in manifest["notes"])]


def _sources(manifest: dict[str, Any]) -> list[str]:
    lines = []
    for index, source in enumerate(manifest["config"]["sources"]):
        forms = manifest["forms"].get(f"data.sources.{index}", {})
        held = ", ".join(f"{count:,} {form}" for form, count in forms.items()) or "no record"
        where = source.get("path") or source.get("name") or source.get("generator") or source["task"]
        lines.append(f"- {source['task']}: {source['type']} `{where}`: {held}")
        unread = manifest.get("unread", {}).get(f"data.sources.{index}", {})  # older sets have none
        lines += [f"  - {note}" for note in note_on_unread(unread, most=_LISTED)]
    return lines


def _removed(manifest: dict[str, Any]) -> list[str]:
    lines = []
    for task, reasons in manifest["removed"].items():
        for reason, found in reasons.items():
            lines.append(f"- {task}: {found['documents']:,} {reason}")
            lines += [f"  - {place}" for place in found["first"]]
    return lines or ["Nothing."]
