"""Rows of text files: JSON lines and plain text."""

import codecs
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_prep.sources.blocks import Row, Unreadable
from data_prep.sources.lines import LONGEST, BoundedLines, numbered_lines
from data_prep.user_error import UserError

_SPEAKER = {"role", "from"}  # fields of a turn
_RECORD = {"messages", "conversations", "instruction", "prompt", "text"}  # fields that make it a record
_VIEWER = {"row_idx", "row", "truncated_cells"}
ZERO_BYTE = "holds a zero byte, so it is not text; remove the byte"


def refuse_other_encodings(start: bytes, path: str) -> None:
    """Raises UserError if a file that begins with `start` is not UTF-8 text."""
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path}:1: the file is UTF-16; save it as UTF-8")
    if b"\0" in start[:64]:
        raise UserError(f"{path}:1: the file holds zero bytes, so it is not text; save it as UTF-8 text")


def read_json_lines(file: BinaryIO, path: str) -> Iterator[Row]:
    """Lines as bytes, numbered from 1, without blank ones; parse_object reads them."""
    for number, line in numbered_lines(file, path):
        if line.strip() not in (b"", codecs.BOM_UTF8):
            yield number, line


def parse_object(text: bytes, origin: str, expected: str) -> dict[str, Any]:
    """Parses one JSON object, or a list of turns as {"messages": turns}. Raises UserError for anything else, and for
    repeated keys."""
    try:
        record = json.loads(text.decode("utf-8-sig"), object_pairs_hook=without_repeats)
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: {no_utf8(text[error.start])}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not JSON ({_json_cause(error)}); expected {expected}, correct it") from error
    if isinstance(record, list) and record and all(map(is_turn, record)):
        return {"messages": record}
    if not isinstance(record, dict):
        raise UserError(f"{origin}: not a JSON object; expected {expected}, correct it")
    return _unwrapped(record, origin) if record.keys() == _VIEWER else record


def is_turn(value: Any) -> bool:
    """Whether a JSON value is a turn of a conversation rather than a record."""
    return isinstance(value, dict) and not value.keys().isdisjoint(_SPEAKER) and value.keys().isdisjoint(_RECORD)


def _unwrapped(row: dict[str, Any], origin: str) -> dict[str, Any]:
    """The record in a row as the Hub's viewer sends it."""
    if row["truncated_cells"] or not isinstance(row["row"], dict):
        raise UserError(f"{origin}: the Hub's viewer has cut {row['truncated_cells']}; download the dataset itself")
    return dict(row["row"])


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dictionary of these keys and values. Raises ValueError for repeated keys."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"key {first_repeated([name for name, _ in pairs])!r} is repeated")
    return record


def first_repeated(names: list[str]) -> str | None:
    """The first name that occurs twice, if any."""
    counts = Counter(names)
    return next((name for name in names if counts[name] > 1), None)


def read_plain_text(file: BinaryIO, path: str, sample_by: str) -> Iterator[Row]:
    """Documents of plain text as {"text": ...}, numbered by their first line, without blank ones."""
    if sample_by == "document":
        content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise UserError(f"{path}: over {LONGEST >> 20} MiB in one document; set sample_by: paragraph or line")
        samples = iter([(1, content)])
    elif sample_by == "line":
        samples = numbered_lines(file, path)
    else:
        samples = _paragraphs(file, path)
    for number, content in samples:
        try:
            text = content.decode("utf-8-sig").replace("\r\n", "\n").strip("\n")  # indentation stays
        except UnicodeDecodeError as error:
            yield number, Unreadable(no_utf8(content[error.start]))
            continue
        if "\0" in text:
            yield number, Unreadable(ZERO_BYTE)
        elif text.strip():
            yield number, {"text": text}


def no_utf8(byte: int) -> str:
    """The reason for a row with a byte that is not UTF-8."""
    return f"byte {byte:02x} is not UTF-8; save the file as UTF-8"


def _paragraphs(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    lines = BoundedLines(file, path)
    paragraph = bytearray()
    for line in itertools.chain(lines, [b""]):
        if line.strip():
            paragraph += line
            continue
        if paragraph:
            yield lines.row, bytes(paragraph)
        paragraph.clear()
        lines.end_row()


def _json_cause(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos}"
    if isinstance(error, RecursionError):
        return "too many nested lists and objects"
    return str(error).partition(";")[0]  # a repeated key, or an integer of over 4300 digits
