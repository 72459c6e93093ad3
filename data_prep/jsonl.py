"""JSONL files in Alpaca form (instruction, input, output) or chat form (messages)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.config import JsonlSource
from data_prep.documents import Document, Message
from data_prep.errors import UserError


def read_jsonl(source: JsonlSource, key: str) -> Iterator[Document]:
    """The documents of one file, in its order; blank lines are passed over, unknown fields ignored.

    `key` is the recipe's key of the source, for errors. Raises UserError with file and line where the file cannot
    be read, a line is no JSON object, or a field is missing or no text.
    """
    to_messages = None
    for origin, record in _records(source.path, key):
        to_messages = to_messages or _form_of(record, origin)
        yield Document(source.task, to_messages(record, origin), origin)


def _records(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    origin = f"{path}:{number}"
                    yield origin, _parse(line, origin)
    except OSError as error:
        raise UserError(
            f"{key}: cannot read {path} ({error.strerror}); expected a readable JSONL file, give its path"
        ) from error


def _parse(line: bytes, origin: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{origin}: byte {line[error.start : error.end].hex()} is not UTF-8; save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or an integer of over 4300 digits
        raise UserError(f"{origin}: not JSON ({error}); expected one JSON object a line, correct the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{origin}: a JSON {_kind(record)}; expected one JSON object a line, correct the line")
    return record


def _form_of(record: dict[str, Any], origin: str) -> Callable[[dict[str, Any], str], list[Message]]:
    if "messages" in record:
        return _from_chat
    if "instruction" in record:
        return _from_alpaca
    raise UserError(
        f"{origin}: fields {sorted(record)}; expected `instruction` and `output` (Alpaca form) or `messages` "
        "(chat form), rename the fields"
    )


def _from_alpaca(record: dict[str, Any], origin: str) -> list[Message]:
    instruction = _text(record, "instruction", origin)
    given = _text(record, "input", origin) if record.get("input") is not None else ""
    question = f"{instruction}\n\n{given}" if given else instruction
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(record, "output", origin)},
    ]


def _from_chat(record: dict[str, Any], origin: str) -> list[Message]:
    turns = record.get("messages")
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"{origin}: field `messages` is {_kind(turns)}; expected a list of one or more turns, correct the line"
        )
    return [_turn(turn, f"{origin}: messages[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {_kind(turn)}; expected an object with `role` and `content`")
    return {"role": _text(turn, "role", where), "content": _text(turn, "content", where)}


def _text(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise UserError(f"{where}: lacks field `{field}`; it has {sorted(record)}, add the field")
    value = record[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field `{field}` is {_kind(value)}; expected text, put it in quotes")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which no tokenizer takes
        raise UserError(
            f"{where}: field `{field}` holds half a surrogate pair at character {error.start}; remove it"
        ) from error
    return value


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "true or false",
        int: "number",
        float: "number",
        list: "list",
        dict: "object",
    }
    return names.get(type(value), "text") if value != [] else "an empty list"
