"""Records of Parquet and Arrow files and of datasets on the Hugging Face Hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.config import HubSource
from data_prep.sources.arrow_values import record_converter
from data_prep.sources.blocks import Row, Unreadable
from data_prep.sources.text import first_repeated
from data_prep.user_error import UserError

_ROWS = 1000  # records converted to Python objects at once
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow's, since 2019


def read_parquet(path: Path) -> Iterator[Row]:
    """Records of a Parquet file, numbered from 0. Raises UserError if it is damaged."""
    yield from _records(_parquet_batches(path), path, "Parquet")


def read_arrow(path: Path) -> Iterator[Row]:
    """Records of an Arrow file or stream, as by `datasets`, numbered from 0. Raises UserError if it is damaged."""
    yield from _records(_arrow_batches(path), path, "Arrow")


def read_hub(source: HubSource, key: str) -> Iterator[Row]:
    """Records of a dataset on the Hub, streamed, numbered from 0. Raises UserError if it cannot be loaded."""
    from datasets import load_dataset

    try:
        rows = load_dataset(source.name, source.subset, split=source.split, revision=source.revision, streaming=True)
        # as Arrow tables: they say which columns hold JSON, and how exact their numbers are
        yield from enumerate(record for table in rows.with_format("arrow").iter(_ROWS) for record in _converted(table))
    except Exception as error:  # by `datasets`, huggingface_hub, fsspec and network libraries
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{key}.name: cannot load {source.name} from the Hub ({cause}); check name, subset, split and network, or "
            "download it and use a source of type files"
        ) from error


def hub_revision(source: HubSource, key: str) -> str:
    """The commit of a dataset on the Hub. Raises UserError if the Hub cannot be reached."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(source.name, revision=source.revision).sha)
    except Exception as error:  # by huggingface_hub and network libraries
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{key}.name: cannot find {source.name} on the Hub ({cause}); check name and network, or download it and "
            "use a source of type files"
        ) from error


def _records(batches: Iterator[Any], path: Path, kind: str) -> Iterator[Row]:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            if (name := first_repeated(batch.schema.names)) is not None:
                raise ValueError(f"column {name!r} is repeated")
            batch.validate(full=True)  # checks UTF-8 and offsets; wrong offsets would crash the process
            for start in range(0, batch.num_rows, _ROWS):
                for record in _converted(batch.slice(start, _ROWS)):
                    yield number, record
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: invalid values
        cause = " ".join(str(error).split())[:200] if path.stat().st_size else "it is empty, 0 bytes"
        place = f"{path}, from record {number} on" if number else str(path)
        raise UserError(
            f"{place}: not a readable {kind} file ({cause}); download it again, or correct its format"
        ) from error


def _converted(table: Any) -> Iterator[dict[str, Any] | Unreadable]:
    """Records of a pyarrow.RecordBatch or pyarrow.Table."""
    convert = record_converter(table.schema)
    for row in table.to_pylist():
        try:
            yield convert(row)
        except ValueError as error:
            yield Unreadable(str(error))


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from file.iter_batches(_ROWS)


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            reader = pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:  # a stream: it has no index at its end
            yield from _stream_batches(file)
            return
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


def _stream_batches(file: Any) -> Iterator[Any]:
    import pyarrow

    file.seek(0)
    yield from pyarrow.ipc.open_stream(file)
    end = file.tell()
    file.seek(max(end - len(_END_OF_STREAM), 0))
    if file.read() != _END_OF_STREAM:  # pyarrow accepts streams cut between batches, and data after them
        raise ValueError("the stream is cut off, or does not end with its end mark")
