"""Contents that are lists of parts: texts, and the calls, results and reasoning that Anthropic writes among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from data_prep.documents import Message
from data_prep.fields import Fields, Spellings
from data_prep.tool_calls import read_calls
from data_prep.user_error import UserError
from data_prep.values import is_empty, kind_of, parsed, text_of

_KINDS = Spellings(
    {
        "text": ("text", "input_text", "output_text"),
        "reasoning": ("thinking", "reasoning"),
        "call": ("tool_use", "tool_call"),
        "result": ("tool_result",),
    }
)
_ORDER = ("reasoning", "text", "call")  # in which chat templates write an answer
_FIELDS = Spellings(
    {
        "text": ("text", "thinking", "reasoning"),
        "id": ("tool_use_id", "tool_call_id", "call_id"),
        "name": ("name", "tool_name"),
        "content": ("content", "result", "output"),
        "kind": ("type",),
    }
)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a content. kind: text, reasoning, call or result; value: its text, call or message of role tool."""

    kind: str
    value: Any
    spelt: str  # its type in the record


def read_parts(content: list[Any], field: str, where: str, unread: set[str]) -> list[Part]:
    """The parts of a content, which is in `field` of a turn. Adds the names of fields that are not read to `unread`."""
    return [_read_part(parsed(part), field, where, unread) for part in content]


def answer_of(parts: Sequence[Part], where: str) -> Message:
    """The fields of the assistant turn that has these parts.

    Raises UserError for parts in an order that templates cannot write, and for results.
    """
    kinds = [part.kind for part in parts]
    if "result" in kinds:
        raise _misplaced(parts[kinds.index("result")], "in a turn of assistant", "user turns", where)
    for before, part in pairwise(parts):
        if _ORDER.index(part.kind) < _ORDER.index(before.kind):
            raise _misplaced(part, f"after one of type {before.spelt!r}", "thinking, then text, then calls", where)
    reasoning, text = (_joined(parts, kind) for kind in ("reasoning", "text"))
    calls = [part.value for part in parts if part.kind == "call"]
    return {
        **({"content": text} if text or not calls else {}),
        **({"reasoning_content": reasoning} if reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def turns_of(parts: Sequence[Part], role: str, where: str) -> list[Message]:
    """The turns of a role other than assistant that has these parts: results become turns of their own, in place."""
    messages: list[Message] = []
    for kind, group in groupby(parts, key=lambda part: part.kind):
        alike = list(group)
        if kind in ("call", "reasoning"):
            raise _misplaced(alike[0], f"in a turn of {role}", "assistant turns", where)
        if kind == "result":
            messages += [part.value for part in alike]
        else:
            messages.append({"role": role, "content": _joined(alike, "text")})
    return messages


def _read_part(part: Any, field: str, where: str, unread: set[str]) -> Part:
    spelt = part.get("type") if isinstance(part, dict) else None
    if not isinstance(spelt, str) or (kind := _KINDS.meaning(spelt)) is None:
        found = f"of type {spelt!r}" if isinstance(part, dict) else f"that is {kind_of(part)}"
        raise UserError(
            f"{where}: `{field}` has a part {found}; expected parts of type text, tool_use, tool_result or "
            "thinking, remove the record"
        )
    part = {name: value for name, value in part.items() if value is not None}
    if kind == "call":
        return Part(kind, read_calls(part, where, unread)[0], spelt)
    fields = Fields(part, _FIELDS, where)
    fields.remove(*fields.spelt("kind"))
    value = _result(fields, unread) if kind == "result" else _text(fields, "text", unread)
    unread |= {f"field {name} of content parts" for name in fields.left}
    return Part(kind, value, spelt)


def _result(fields: Fields, unread: set[str]) -> Message:
    said = {meaning: name for meaning in ("id", "name") if (name := fields.take(meaning))}
    return {
        "role": "tool",
        "content": _text(fields, "content", unread),
        **({"tool_call_id": text_of(fields.values, said["id"], fields.where)} if "id" in said else {}),
        **({"name": text_of(fields.values, said["name"], fields.where)} if "name" in said else {}),
    }


def _text(fields: Fields, meaning: str, unread: set[str]) -> str:
    """The text in a field, which may be a list of text parts itself; empty for a result without any."""
    name = fields.take(meaning)
    if name is None and meaning == "content" and not fields.left:
        return ""
    value = fields.values.get(name or meaning)
    if not isinstance(value, list):
        return text_of(fields.values, name or meaning, fields.where)
    parts = [] if is_empty(value) else read_parts(value, name or meaning, fields.where, unread)
    if other := next((part for part in parts if part.kind != "text"), None):
        raise _misplaced(other, f"in `{name}` of a part", "parts of text there", fields.where)
    return _joined(parts, "text")


def _joined(parts: Sequence[Part], kind: str) -> str:
    return "".join(part.value for part in parts if part.kind == kind)


def _misplaced(part: Part, where_it_is: str, expected: str, where: str) -> UserError:
    return UserError(
        f"{where}: a part of type {part.spelt!r} {where_it_is}; expected {expected}, correct or remove the record"
    )
