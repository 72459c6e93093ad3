"""Every kind of source, in two halves: blocks of rows, read in one process, and their documents, made in many."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.config import DataConfig, FilesSource, HubSource, ReasoningGymSource, SuiteSource
from data_prep.documents import Document
from data_prep.forms import renamed, to_document
from data_prep.sources.blocks import Block, Row, Unreadable, in_blocks
from data_prep.sources.columns import arrow, hub, parquet
from data_prep.sources.finding import DAMAGE, files_of, format_of, is_compressed, open_file, unreadable
from data_prep.sources.gym import Generators
from data_prep.sources.json_array import json_array
from data_prep.sources.text import json_lines, parse_object, plain_text, refuse_other_encodings, table
from data_prep.suite.tasks import records
from data_prep.user_error import UserError


def source_key(index: int) -> str:
    """The source's key in the recipe."""
    return f"data.sources.{index}"


def blocks_of(config: DataConfig) -> Iterator[Block]:
    """All rows of all sources, in their order. Raises UserError for files that cannot be read to their end."""
    for index, source in enumerate(config.sources):
        key = source_key(index)
        if isinstance(source, ReasoningGymSource):
            yield from in_blocks(index, source.generator, False, ((number, {}) for number in range(source.count)))
        elif isinstance(source, SuiteSource):
            yield from in_blocks(index, source.task, False, enumerate(records(source, key)))
        elif isinstance(source, HubSource):
            yield from in_blocks(index, source.name, False, hub(source, key))
        else:
            for path in files_of(source, key)[0]:
                yield from _blocks_of_file(index, source, path, key)


class DocumentMaker:
    """Makes documents of blocks; keeps the process of generators, which is slow to start."""

    def __init__(self, config: DataConfig) -> None:
        self._sources = config.sources
        self._generators = Generators()

    def documents(self, block: Block) -> Iterator[tuple[int, Document | UserError]]:
        """Number and document of each row, in order; where a row holds none, the reason, with its place."""
        source = self._sources[block.source]
        if isinstance(source, ReasoningGymSource):
            origins = {number: block.origin(number) for number, _ in block.rows}
            yield from zip(origins, self._generators.documents(source, source_key(block.source), origins), strict=True)
            return
        for number, row in block.rows:
            try:
                yield number, _document(source, row, block.origin(number), block.by_line)
            except UserError as error:
                yield number, error


def _document(
    source: FilesSource | HubSource | SuiteSource,
    row: bytes | dict[str, Any] | Unreadable,
    origin: str,
    by_line: bool,
) -> Document:
    if isinstance(row, Unreadable):
        raise UserError(f"{origin}: {row.why}")
    if isinstance(row, bytes):
        row = parse_object(row, origin, "one JSON object a line" if by_line else "one array of JSON objects")
    fields = {} if isinstance(source, SuiteSource) else source.fields
    return to_document(renamed(row, fields, origin), source.task, origin)


def _blocks_of_file(index: int, source: FilesSource, path: Path, key: str) -> Iterator[Block]:
    try:
        kind = format_of(path, source)
        if kind in ("parquet", "arrow"):
            if is_compressed(path):
                raise UserError(f"{key}.path: {path} is compressed as a whole; unpack it")
            yield from in_blocks(index, str(path), False, parquet(path) if kind == "parquet" else arrow(path))
            return
        with open_file(path) as file:
            by_line, rows = _text_rows(io.BufferedReader(file), str(path), kind, source.sample_by)
            yield from in_blocks(index, str(path), by_line, rows)
    except DAMAGE as error:
        raise unreadable(path, error, key) from error


def _text_rows(file: io.BufferedReader, path: str, kind: str, sample_by: str) -> tuple[bool, Iterator[Row]]:
    """Whether rows go by line, and the rows."""
    start = file.peek(64)
    refuse_other_encodings(start, path)
    if kind == "text":
        return True, plain_text(file, path, sample_by)
    if kind in ("csv", "tsv"):
        return True, table(file, path, "," if kind == "csv" else "\t")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        return False, json_array(file, path)
    return True, json_lines(file)
