"""Reads sources as `prepare` does, in this process and without a tokenizer."""

import io
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import DataConfig
from data_prep.documents import Document
from data_prep.sources.read import DocumentMaker, read_blocks
from data_prep.user_error import UserError


def data_of(path: Path | str, **keys: Any) -> DataConfig:
    """The data section with one source of files; `keys` are the source's."""
    source = {"type": "files", "task": "sums", "path": path, **keys}
    return DataConfig(prepared_dir=Path("prepared"), seq_len=64, sources=[source])


def rows_of(path: Path | str, **keys: Any) -> list[Document | UserError]:
    """The result of each row: its document, or the error."""
    config = data_of(path, **keys)
    maker = DocumentMaker(config)
    return [row for block in read_blocks(config) for _, row in maker.documents(block)]


def read(path: Path | str, **keys: Any) -> list[Document]:
    """The documents; raises the error of a bad row, as with `bad_rows: refuse`."""
    rows = rows_of(path, **keys)
    for row in rows:
        if isinstance(row, UserError):
            raise row
    return rows


def refusal(path: Path | str, **keys: Any) -> str:
    """The one-line error message; fails if there is none, or if it has several lines."""
    with pytest.raises(UserError) as caught:
        read(path, **keys)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


def places(documents: list[Document]) -> list[str]:
    """Their places in their files: ":line" or "[record]"."""
    return [re.search(r":\d+$|\[\d+\]$", document.origin)[0] for document in documents]


def texts(documents: list[Document]) -> list[list[str] | str]:
    """The text of each, or the contents of its turns."""
    return [d.text if d.text is not None else [turn["content"] for turn in d.messages] for d in documents]


class GeneratedBytes(io.RawIOBase):
    """A file that is made while it is read: `count` times `row` with commas between, after `start`, before `end`."""

    def __init__(self, start: bytes, row: bytes, end: bytes, count: int) -> None:
        between = itertools.repeat(b"," + row, count - 1)
        self._pieces = itertools.chain([start + row], between, [end])

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        piece = next(self._pieces, b"")
        buffer[: len(piece)] = piece
        return len(piece)
