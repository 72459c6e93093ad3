"""Every kind of source, in two steps: one process reads blocks of rows, many processes make documents of them."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.config import DataConfig, FilesSource, HubSource, ReasoningGymSource, SuiteSource
from data_prep.documents import Document
from data_prep.forms import rename_fields, to_document
from data_prep.sources.blocks import Block, Row, Unreadable, in_blocks
from data_prep.sources.columns import read_arrow, read_hub, read_parquet
from data_prep.sources.delimited import read_table, refuse_other_delimiters
from data_prep.sources.file_kind import START, mistaken_for
from data_prep.sources.finding import (
    READ_ERRORS,
    find_files,
    format_of,
    is_compressed,
    open_file,
    refuse_other_kind,
    unreadable_file,
)
from data_prep.sources.gym import GymProcess
from data_prep.sources.json_layout import find_layout, read_layout
from data_prep.sources.text import parse_object, read_plain_text, refuse_other_encodings
from data_prep.sources.tsv import read_tsv
from data_prep.suite.tasks import records
from data_prep.user_error import UserError


def source_key(index: int) -> str:
    """The source's key in the recipe."""
    return f"data.sources.{index}"


def read_blocks(config: DataConfig) -> Iterator[Block]:
    """All rows of all sources, in order. Raises UserError for files that cannot be read to their end."""
    for index, source in enumerate(config.sources):
        key = source_key(index)
        if isinstance(source, ReasoningGymSource):
            yield from in_blocks(index, source.generator, False, ((number, {}) for number in range(source.count)))
        elif isinstance(source, SuiteSource):
            yield from in_blocks(index, source.task, False, enumerate(records(source, key)))
        elif isinstance(source, HubSource):
            yield from in_blocks(index, source.name, False, read_hub(source, key))
        else:
            for path in find_files(source, key)[0]:
                yield from _blocks_of_file(index, source, path, key)


class DocumentMaker:
    """Makes documents of blocks. Keeps the process of reasoning-gym, which is slow to start."""

    def __init__(self, config: DataConfig) -> None:
        self._sources = config.sources
        self._generators = GymProcess()

    def documents(self, block: Block) -> Iterator[tuple[int, Document | UserError]]:
        """Number and document of each row, in order; for a bad row, the error that says where and why."""
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
        row = parse_object(row, origin, "one JSON object per line" if by_line else "one array of JSON objects")
    record = row if isinstance(source, SuiteSource) else rename_fields(row, source.fields, origin)
    return to_document(record, source.task, origin)


def _blocks_of_file(index: int, source: FilesSource, path: Path, key: str) -> Iterator[Block]:
    refuse_other_kind(path, source, key)
    try:
        kind = format_of(path, source)
        if kind in ("parquet", "arrow"):
            if is_compressed(path):
                raise UserError(f"{key}.path: {path} is compressed as a whole; unpack it")
            yield from in_blocks(index, str(path), False, read_parquet(path) if kind == "parquet" else read_arrow(path))
            return
        with open_file(path) as file:
            _refuse_no_text(file.peek(START), path, kind, key)
            layout = find_layout(file, str(path), source.fields.values()) if kind == "json" else None
        with open_file(path) as file:
            if layout is not None:
                rows = read_layout(layout, file, str(path))
                yield from in_blocks(index, str(path), layout.by_line, rows, layout.unread)
            else:
                yield from in_blocks(index, str(path), True, _text_rows(file, str(path), kind, source.sample_by))
    except READ_ERRORS as error:
        raise unreadable_file(path, error, key) from error


def _refuse_no_text(start: bytes, path: Path, kind: str | None, key: str) -> None:
    """Raises UserError if a file whose unpacked bytes begin with `start` is something else than text in UTF-8."""
    if what := mistaken_for(start, kind, ""):
        raise UserError(f"{key}.path: {path} is {what}")
    refuse_other_encodings(start, str(path))


def _text_rows(file: io.BufferedReader, path: str, kind: str | None, sample_by: str) -> Iterator[Row]:
    if kind == "text":
        return read_plain_text(file, path, sample_by)
    delimiter = "," if kind == "csv" else "\t"
    start = file.peek(START)
    refuse_other_delimiters(start, path, delimiter)
    is_quoted = start.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n")[:1] == b'"'  # then every cell is
    return read_tsv(file, path) if kind == "tsv" and not is_quoted else read_table(file, path, delimiter)
