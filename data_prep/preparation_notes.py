"""What a preparation remarks on that is no error: about its sources, the chat template and the tokenizer."""

from collections import Counter
from typing import Any

from data_prep.chat import ChatTemplate
from data_prep.config import DataConfig, FilesSource
from data_prep.prepare_report import note_on_unread
from data_prep.sources.file_kind import first_bytes, lacks_checksum
from data_prep.sources.finding import find_files, format_of
from data_prep.sources.read import source_key
from data_prep.tally import Tally
from data_prep.tokenizer_checks import notes_on_tokenizer
from data_prep.workers import SourceCounts

_LISTED = 5  # control tokens named in a note
_NO_END_TOKEN = (
    "the chat template ends some assistant turns with no special token: a model trained on this set does not learn to "
    "stop after them"
)
_TODAY = "the chat template writes the current date, so preparing the same input on another day gives another set"
_NOTHING_HELD_OUT = (
    "nothing is held out (data.held_out: 0): runs report no held-out losses, and `teamlora evaluate` has no items"
)


def preparation_notes(
    config: DataConfig, tokenizer: Any, template: ChatTemplate | None, tally: Tally, not_held_out: list[str]
) -> list[str]:
    """The notes of one preparation. template: None without conversations; not_held_out: tasks without held-out
    documents."""
    with_texts = any("text" in counts.forms for counts in tally.sources.values())
    return [
        *_on_held_out(config, not_held_out),
        *(_on_template(template) if template else ()),
        *notes_on_tokenizer(tokenizer, with_texts),
        *(
            f"{source_key(index)}{note}"
            for index, source in enumerate(config.sources)
            for note in (
                *_on_counts(tally.sources.get(index, SourceCounts()), template),
                *(_on_files(source, source_key(index)) if isinstance(source, FilesSource) else ()),
            )
        ),
    ]


def _on_held_out(config: DataConfig, not_held_out: list[str]) -> list[str]:
    if not config.held_out:
        return [_NOTHING_HELD_OUT]
    return [f"task {task!r} has no held-out documents" for task in not_held_out]


def _on_template(template: ChatTemplate) -> list[str]:
    notes = [
        f"the chat template ends the last answer with no special token: {end} is added there"
        for end in template.added_ends()
    ]
    notes += [_NO_END_TOKEN] if "" in template.learned_ends() else []
    notes += [_TODAY] if template.writes_dates() else []
    return notes


def _on_counts(counts: SourceCounts, template: ChatTemplate | None) -> list[str]:
    """Notes on what the records of a source hold; each goes on from the source's key."""
    notes = []
    if len(counts.forms) > 1:
        mixture = ", ".join(f"{count:,} {form}" for form, count in counts.forms.most_common())
        notes.append(f" holds records of several forms: {mixture}")
    notes += [f": {note}" for note in note_on_unread(counts.unread)]
    if counts.with_tools and template and not template.writes_tools():
        notes.append(f": the chat template does not write the tools that {counts.with_tools:,} records give")
    if counts.tokens_in_text:
        notes.append(
            f": documents hold control tokens in their text ({_most_frequent(counts.tokens_in_text)}), encoded as "
            "ordinary text; data.special_tokens_in_text: allow would make control tokens of them"
        )
    return notes


def _on_files(source: FilesSource, key: str) -> list[str]:
    found, skipped = find_files(source, key)
    listed = {
        "empty files": [path for path in found if not path.stat().st_size],
        "files or linked folders skipped": skipped,
        ".zst files without checksums, so changed bytes may go unnoticed (`zstd --check` adds them)": [
            path for path in found if path.suffix.lower() == ".zst" and lacks_checksum(first_bytes(path))
        ],
    }
    notes = [f": {len(paths)} {what}, the first is {paths[0]}" for what, paths in listed.items() if paths]
    formats = Counter(format_of(path, source) for path in found)
    if len(formats) > 1:
        several = ", ".join(f"{count:,} {name}" for name, count in formats.most_common())
        notes.insert(0, f": files of several formats are read ({several}); a pattern reads those of one")
    return notes


def _most_frequent(counts: Counter[str]) -> str:
    found = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    more = f", and {len(found) - _LISTED} others" if len(found) > _LISTED else ""
    return ", ".join(f"{token} in {count:,}" for token, count in found[:_LISTED]) + more
