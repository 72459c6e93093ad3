"""Raw data to a prepared set: read, label, split, pack, write."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from data_prep.config import DataConfig, JsonlSource, Source
from data_prep.documents import Document
from data_prep.encode import NO_LABELS_AFTER_TRUNCATION, Dropped, Encoded, Encoder
from data_prep.errors import UserError
from data_prep.fingerprint import preparation_key, source_states, tokenizer_hashes
from data_prep.gym import read_generator
from data_prep.jsonl import read_jsonl
from data_prep.manifest import Rows, describe, read_manifest, write_manifest
from data_prep.packing import pack
from data_prep.report import PrepareReport
from data_prep.split import Split, split_documents
from data_prep.storage import refuse_foreign_folder, replacing, write_items, write_rows

_NO_END_TOKEN = (
    "the chat template ends assistant turns with no special token: a model trained on this set does not learn to stop"
)


def prepare(config: DataConfig, tokenizer: Any) -> PrepareReport:
    """Writes the prepared set of `config` to its prepared_dir, or keeps the one there if it is just that set.

    `tokenizer` is a fast transformers tokenizer with a chat template. The same configuration, sources, tokenizer
    and code give the same bytes. Raises UserError for every mistake in sources or options; the folder is then as it
    was.
    """
    started = time.perf_counter()
    refuse_foreign_folder(config.prepared_dir)
    encoder = Encoder(tokenizer, config.seq_len, config.system_prompt)
    previous = _previous_manifest(config)
    sources = source_states(config, previous.get("sources"))
    hashes = tokenizer_hashes(tokenizer)
    key = preparation_key(config, sources, hashes)
    if previous.get("key") == key:
        return PrepareReport(config.prepared_dir, previous, time.perf_counter() - started, reused=True)

    tasks = list(dict.fromkeys(source.task for source in config.sources))
    split = _split(config, tasks, encoder)
    rows = {"train": _rows(split.train, config), "held_out": _rows(split.held_out, config)}
    made_from = {"key": key, "tokenizer": hashes, "sources": sources}
    manifest = describe(config, tasks, rows, split.dropped, made_from, _notes(tasks, split, encoder))
    with replacing(config.prepared_dir) as folder:
        for name, packed in rows.items():
            write_rows(packed, tasks, folder / name)
        write_items(split.held_out, config.system_prompt, folder)
        write_manifest(manifest, folder)
    return PrepareReport(config.prepared_dir, manifest, time.perf_counter() - started, reused=False)


def _previous_manifest(config: DataConfig) -> dict[str, Any]:
    """The manifest of the set that stands in prepared_dir; empty where none does, or none that can be used."""
    try:
        return read_manifest(config.prepared_dir) or {}
    except UserError:
        return {}  # damaged or of another format: it is made anew


def _split(config: DataConfig, tasks: Sequence[str], encoder: Encoder) -> Split:
    documents = chain.from_iterable(_read(source, i) for i, source in enumerate(config.sources))
    encoded: list[Encoded] = []
    dropped: list[Dropped] = []
    for result in encoder.encode(documents):
        (dropped if isinstance(result, Dropped) else encoded).append(result)
    for task in _absent(tasks, encoded):
        raise UserError(_why_nothing_is_left(task, dropped, config))

    split = split_documents(encoded, config.held_out, config.seed)
    for task in _absent(tasks, split.train):
        raise UserError(
            f"data.held_out: {config.held_out} leaves no document of task {task!r} to train on; add documents or "
            "lower data.held_out"
        )
    split.dropped[:0] = dropped
    return split


def _read(source: Source, index: int) -> Iterator[Document]:
    key = f"data.sources.{index}"
    return read_jsonl(source, f"{key}.path") if isinstance(source, JsonlSource) else read_generator(source, key)


def _absent(tasks: Sequence[str], documents: Sequence[Encoded]) -> list[str]:
    present = {encoded.document.task for encoded in documents}
    return [task for task in tasks if task not in present]


def _why_nothing_is_left(task: str, dropped: Sequence[Dropped], config: DataConfig) -> str:
    lost = [document for document in dropped if document.document.task == task]
    if not lost:
        paths = [str(s.path) for s in config.sources if isinstance(s, JsonlSource) and s.task == task]
        return (
            f"data.sources: task {task!r} is empty: no record in {', '.join(paths)}; add documents or remove the source"
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(d.reason for d in lost).most_common())
    advice = "raise data.seq_len" if lost[0].reason == NO_LABELS_AFTER_TRUNCATION else "correct the documents"
    return (
        f"data.sources: task {task!r} has no document left, all {len(lost)} were dropped at data.seq_len="
        f"{config.seq_len} ({reasons}; the first is {lost[0].document.origin}); {advice}"
    )


def _notes(tasks: Sequence[str], split: Split, encoder: Encoder) -> list[str]:
    notes = [f"task {task!r} has no held-out documents" for task in _absent(tasks, split.held_out)]
    return notes if encoder.template.closes_turns() else [*notes, _NO_END_TOKEN]


def _rows(documents: Sequence[Encoded], config: DataConfig) -> Rows:
    """Packed rows, in an order that depends on no source's place and mixes the tasks."""
    mixed = sorted(documents, key=lambda encoded: encoded.document.digest(config.seed))
    rows = pack([len(encoded) for encoded in mixed], config.seq_len)
    return [[mixed[i] for i in row] for row in sorted(rows)]
