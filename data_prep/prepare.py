"""Turns raw data into a prepared set: read, label, clean, split, mix, pack, write."""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import DataConfig
from data_prep.duplicates import (
    DUPLICATE,
    NEAR_DUPLICATE,
    NearDuplicateFilter,
    mark_first_copies,
    refuse_missing_library,
)
from data_prep.encode import NO_LABELS_AFTER_CUT, OVER_LONG, Encoder
from data_prep.fingerprint import (
    code_hash,
    file_states,
    library_versions,
    preparation_key,
    same_content,
    source_states,
    tokenizer_state,
)
from data_prep.manifest import FORMAT_VERSION, SPLITS, describe_split, read_manifest, write_manifest
from data_prep.mixing import draw
from data_prep.plots import write_plots
from data_prep.preparation_notes import preparation_notes
from data_prep.prepare_report import PrepareReport, write_report
from data_prep.prepared_folder import exclusive_preparation, refuse_foreign_folder, write_items, write_rows
from data_prep.publish import blame_option, publish_atomically
from data_prep.sources.read import read_blocks, source_key
from data_prep.split import in_digest_order, split_documents
from data_prep.spool import Removals, Spool
from data_prep.suite.tasks import refuse_unknown_tasks
from data_prep.tally import Tally
from data_prep.tokenizer_checks import check_tokenizer
from data_prep.user_error import UserError
from data_prep.workers import encode_blocks


def prepare(
    config: DataConfig, tokenizer: Any, tokenizer_files: Sequence[Path] = (), say: Callable[[str], None] = print
) -> PrepareReport:
    """Writes the prepared set of `config` to its prepared_dir, or keeps the set there if it is the same one.

    `tokenizer` is a fast transformers tokenizer. `tokenizer_files` are the files it was loaded from; find_unchanged_set
    recognizes it by them. The same configuration, sources, tokenizer and code give the same bytes. Raises UserError for
    mistakes in sources or options, and then leaves the folder as it was.
    """
    started = time.perf_counter()
    refuse_missing_library(config.cleaning)
    refuse_unknown_tasks(config)
    refuse_foreign_folder(config.prepared_dir)
    remarks = check_tokenizer(tokenizer)
    with exclusive_preparation(config.prepared_dir, say):
        previous = _previous_manifest(config)
        sources = source_states(config, previous.get("sources", ()))
        made_for = tokenizer_state(tokenizer)
        key = preparation_key(config, sources, made_for)
        if previous.get("key") == key:
            return PrepareReport(config.prepared_dir, previous, time.perf_counter() - started, reused=True)
        made_from = {
            "format_version": FORMAT_VERSION,
            "key": key,
            "tokenizer": made_for,
            "tokenizer_files": file_states(tokenizer_files, "base.model"),
            "sources": sources,
            "libraries": library_versions(config),
            "code": code_hash(),
        }
        with blame_option("data.prepared_dir", config.prepared_dir), publish_atomically(config.prepared_dir) as folder:
            manifest = made_from | _write_set(config, tokenizer, folder, remarks)
            write_manifest(manifest, folder)
            write_report(manifest, folder)
            write_plots(manifest, folder)
    return PrepareReport(config.prepared_dir, manifest, time.perf_counter() - started, reused=False)


def find_unchanged_set(config: DataConfig, tokenizer_files: Sequence[Path]) -> PrepareReport | None:
    """The report on the set in prepared_dir if `config` and a tokenizer in these files would give the same set; else
    None.

    Fast: reads neither tokenizer nor sources whose sizes and modification times are unchanged. Raises UserError for
    sources that cannot be found and for missing libraries.
    """
    started = time.perf_counter()
    refuse_missing_library(config.cleaning)
    refuse_unknown_tasks(config)
    previous = _previous_manifest(config)
    if not previous.get("tokenizer_files"):
        return None
    remembered = previous["tokenizer_files"]
    if not same_content(file_states(tokenizer_files, "base.model", remembered), remembered):
        return None
    key = preparation_key(config, source_states(config, previous["sources"]), previous["tokenizer"])
    if key != previous["key"]:
        return None
    return PrepareReport(config.prepared_dir, previous, time.perf_counter() - started, reused=True)


def _write_set(config: DataConfig, tokenizer: Any, folder: Path, remarks: list[str]) -> dict[str, Any]:
    """Writes rows and items into `folder`; returns what the manifest says about them. remarks: further notes."""
    removals, tally = Removals(), Tally()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".spool") as spool_folder, Spool(Path(spool_folder)) as spool:
        _encode_sources(spool, config, tokenizer, removals, tally)
        documents = spool.documents
        if missing := _tasks_without(config, documents["task"]):
            raise UserError(_why_nothing_is_left(missing[0], removals, config))
        split = split_documents(documents, config)
        for reason, which in split.removed.items():
            _count_removed(spool, which, reason, removals)
        tally.check_nothing_lost(split, removals)
        if missing := _tasks_without(config, documents["task"][split.train]):
            raise UserError(
                f"data.held_out: {config.held_out} leaves no document of task {config.tasks[missing[0]]!r} to train "
                "on; add documents or lower data.held_out"
            )
        drawn = split.train[draw(documents[split.train], config.tasks, config.mixing)[0]]
        described = {}
        for name, order in zip(SPLITS, (drawn, in_digest_order(documents, split.held_out)), strict=True):
            written = write_rows(spool, order, config, folder / name)
            described[name] = describe_split(documents, order, written, config)
        write_items(spool.items(split.held_out), folder)
    template = Encoder(tokenizer, config).template if tally.has_conversations() else None
    not_held_out = [config.tasks[task] for task in _tasks_without(config, documents["task"][split.held_out])]
    return {
        "tasks": config.tasks,
        "splits": described,
        "removed": removals.by_task(config.tasks),
        "forms": {source_key(index): dict(counts.forms) for index, counts in tally.sources.items()},
        "unread": {
            source_key(index): dict(counts.unread.most_common())
            for index, counts in tally.sources.items()
            if counts.unread
        },
        "different_documents": _by_task(config, documents["task"][split.train]),
        "learned_ends": [end for end in template.learned_ends() if end] if template else [],
        "notes": remarks + preparation_notes(config, tokenizer, template, tally, not_held_out),
        "config": config.model_dump(mode="json"),
    }


def _encode_sources(spool: Spool, config: DataConfig, tokenizer: Any, removals: Removals, tally: Tally) -> None:
    """Reads and encodes all sources into the spool; counts what is removed and what is found."""
    near = None
    if config.cleaning.near_duplicates is not None:
        near = NearDuplicateFilter(config.cleaning.near_duplicates, len(config.tasks))
    read = tally.counted(read_blocks(config))
    with closing(encode_blocks(read, config, tokenizer)) as blocks:  # ends the workers in any case
        for encoded in blocks:
            for removal in encoded.removals:
                removals.add(removal.task, removal.reason, 1, [removal.place])
            tally.add(encoded)
            spool.add(encoded)
            if near is not None and encoded.signatures is not None:
                near.add(encoded.documents, encoded.signatures)
    spool.finish()
    if near is not None:
        first = mark_first_copies(spool.documents)
        _count_removed(spool, np.flatnonzero(~near.kept & ~first), DUPLICATE, removals)
        _count_removed(spool, np.flatnonzero(~near.kept & first), NEAR_DUPLICATE, removals)
        spool.documents = spool.documents[near.kept]


def _count_removed(spool: Spool, which: np.ndarray, reason: str, removals: Removals) -> None:
    """Counts the documents with these indices as removed."""
    tasks = spool.documents["task"][which]
    for task in np.unique(tasks):
        own = which[tasks == task]
        removals.add(int(task), reason, len(own), spool.origins(own))


def _previous_manifest(config: DataConfig) -> dict[str, Any]:
    """The manifest in prepared_dir; empty if there is none or it cannot be used."""
    try:
        return read_manifest(config.prepared_dir) or {}
    except UserError:
        return {}  # damaged or of another format: the set is made again


def _by_task(config: DataConfig, tasks: np.ndarray) -> dict[str, int]:
    """Number of documents per task; tasks: index of each document's task."""
    return dict(zip(config.tasks, np.bincount(tasks, minlength=len(config.tasks)).tolist(), strict=True))


def _tasks_without(config: DataConfig, tasks: np.ndarray) -> list[int]:
    """Indices of the tasks that no document belongs to; tasks: index of each document's task."""
    return [index for index, count in enumerate(_by_task(config, tasks).values()) if not count]


def _why_nothing_is_left(task: int, removals: Removals, config: DataConfig) -> str:
    name = config.tasks[task]
    lost = {reason: count for (of, reason), count in removals.counts.most_common() if of == task}
    if not lost:
        sources = (str(getattr(s, "path", s.type)) for s in config.sources if s.task == name)
        return f"data.sources: task {name!r} is empty: no record in {', '.join(sources)}; add some or remove the source"
    commonest = next(iter(lost))
    reasons = ", ".join(f"{count} {reason}" for reason, count in lost.items())
    advice = "raise data.seq_len" if commonest in (NO_LABELS_AFTER_CUT, OVER_LONG) else "correct the documents"
    return (
        f"data.sources: task {name!r} has no document left, all {sum(lost.values())} were dropped at data.seq_len="
        f"{config.seq_len} ({reasons}; the first: {removals.first[task, commonest][0]}); {advice}"
    )
