"""Records of columnar files, Parquet and Arrow, and of datasets of the Hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.config import HubSource
from data_prep.sources.blocks import Row
from data_prep.sources.text import repeated
from data_prep.user_error import UserError

_ROWS = 1000  # records made into Python objects at once
_EXACT = 2**53  # up to here a float holds every whole number
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow, since 2019


def parquet(path: Path) -> Iterator[Row]:
    """Records, numbered from 0. Raises UserError where the file is damaged."""
    yield from _records(_parquet_batches(path), path, "Parquet")


def arrow(path: Path) -> Iterator[Row]:
    """Records of an Arrow file or stream, as `datasets` writes them, numbered from 0. Raises UserError."""
    yield from _records(_arrow_batches(path), path, "Arrow")


def hub(source: HubSource, key: str) -> Iterator[Row]:
    """Records of a dataset of the Hub, streamed, numbered from 0. Raises UserError where it cannot be had."""
    from datasets import load_dataset

    try:
        records = load_dataset(source.name, source.subset, split=source.split, revision=source.revision, streaming=True)
        for number, record in enumerate(records):
            yield number, as_a_record(record)
    except Exception as error:  # of `datasets`, huggingface_hub, fsspec and the network's libraries
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{key}.name: cannot load {source.name} from the Hub ({cause}); check name, subset, split and network, or "
            "download it and use a source of type files"
        ) from error


def hub_revision(source: HubSource, key: str) -> str:
    """The commit of a dataset of the Hub. Raises UserError where the Hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.name, revision=source.revision).sha
    except Exception as error:  # of huggingface_hub and the network's libraries
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{key}.name: cannot ask the Hub for {source.name} ({cause}); check name and network, or download it and "
            "use a source of type files"
        ) from error


def as_a_record(value: Any) -> Any:
    """Without what comes of standing in a table: the nulls that fill up what some records have and others lack, and the
    floats that whole numbers become beside a null or a fraction."""
    if isinstance(value, dict):
        return {name: as_a_record(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [as_a_record(part) for part in value]
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT
    return int(value) if is_whole else value


def _records(batches: Iterator[Any], path: Path, kind: str) -> Iterator[Row]:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            if (name := repeated(batch.schema.names)) is not None:
                raise ValueError(f"column {name!r} is there twice")
            batch.validate(full=True)  # offsets and UTF-8; wrong offsets would end the process
            for start in range(0, batch.num_rows, _ROWS):
                for record in batch.slice(start, _ROWS).to_pylist():
                    yield number, as_a_record(record)
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: values of no use
        cause = " ".join(str(error).split())[:200]
        place = f"{path}, from record {number} on" if number else str(path)
        raise UserError(f"{place}: no readable {kind} file ({cause}); get it anew, or correct its format") from error


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from file.iter_batches(_ROWS)


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            reader = pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:  # a stream, which has no index at its end
            yield from _stream_batches(file)
            return
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


def _stream_batches(file: Any) -> Iterator[Any]:
    import pyarrow

    file.seek(0)
    yield from pyarrow.ipc.open_stream(file)
    end = file.tell()
    file.seek(max(end - len(_END_OF_STREAM), 0))
    if file.read() != _END_OF_STREAM:  # pyarrow takes a stream cut between two batches, and what follows it, for none
        raise ValueError("the stream is cut off, or does not end with its end mark")
