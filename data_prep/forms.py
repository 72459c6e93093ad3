"""Turns records into documents. The form of a record (chat, Alpaca, ...) is recognized by its fields.

Unknown fields are ignored. A record of no known form, or of a form that cannot be learned from, is refused with its
place.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from data_prep.config import FieldName
from data_prep.documents import Document, Message
from data_prep.sources.json_array import DEEPEST
from data_prep.sources.text import without_repeats
from data_prep.user_error import UserError

_ROLES = {  # ShareGPT's names and other common ones
    "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool", "function_response": "tool",
    "tool_response": "tool", "developer": "system",
}  # fmt: skip
_PASSED_ON = ("tool_call_id",)  # fields that templates use, apart from role, content and tool_calls
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of an answer's reasoning, as in transformers
_PREFERENCES = (("chosen", "rejected"), ("prompt", "completion", "label"))  # TRL's paired and unpaired preferences
_VERDICTS = ("true", "false", "1", "0")  # values of `label` in unpaired preferences
_NO_TEXT = ("image", "images", "video", "videos", "audio", "audios")
_ANSWERS = ("output", "completion")
_EXPECTED = (
    "expected `messages` or `conversations` (chat), `instruction` and `output` (Alpaca), `prompt` and `completion`, or "
    "`text`; rename the fields, or name them under the source's `fields`"
)


def to_document(record: Mapping[str, Any], task: str, origin: str) -> Document:
    """The document in a record. Raises UserError, with a text that begins with `origin`, if there is none."""
    for names in _PREFERENCES:
        is_verdict = "label" not in names or str(record.get("label")).lower() in _VERDICTS
        if is_verdict and all(record.get(name) is not None for name in names):
            raise UserError(
                f"{origin}: a preference row ({', '.join(names)}), but this trainer learns from answers; keep the good "
                "answers as `messages`, or use a preference trainer such as TRL's DPOTrainer"
            )
    if field := next((field for field in _NO_TEXT if record.get(field)), None):
        raise UserError(f"{origin}: has `{field}` beside its text; expected text only, remove the field or the record")
    for field, read in _FORMS.items():
        if record.get(field) is not None:
            return read(record, task, origin)
    if missing := next((field for field in _FORMS if field in record), None):
        raise UserError(f"{origin}: field `{missing}` is null; correct or remove the record")
    raise UserError(f"{origin}: fields {_names(record)}; {_EXPECTED}")


def rename_fields(record: Mapping[str, Any], fields: Mapping[FieldName, str], origin: str) -> Mapping[str, Any]:
    """The record with known names for the fields that the recipe maps; optional ones may be absent.

    If the recipe maps a field that identifies a form, the record is of that form: the identifying fields of other forms
    are left out.
    """
    if not fields:
        return record
    unwanted = {*fields.values(), *(_FORMS if _FORMS.keys() & fields.keys() else ())}
    named = {name: value for name, value in record.items() if name not in unwanted}
    for ours, theirs in fields.items():
        if theirs in record:
            named[ours] = record[theirs]
        elif ours not in ("input", "history", "system", "tools", "choices"):
            raise UserError(
                f"{origin}: lacks field `{theirs}`, which the source's `fields` names for `{ours}`; it has "
                f"{_names(record)}, correct the recipe or the record"
            )
    return named


def _from_chat(record: Mapping[str, Any], task: str, origin: str) -> Document:
    name = "messages" if record.get("messages") is not None else "conversations"
    messages, given = _turns(record[name], f"{origin}: {name}")
    return _document(record, task, origin, "chat" if name == "messages" else "ShareGPT", messages, given)


def _from_alpaca(record: Mapping[str, Any], task: str, origin: str) -> Document:
    question = _text(record, "instruction", origin)
    if record.get("input") not in (None, ""):
        question = "\n\n".join(filter(None, (question, _text(record, "input", origin))))
    turns = [*_history(record, origin), *_exchange(question, _text(record, "output", origin))]
    return _document(record, task, origin, "Alpaca", turns)


def _from_prompt(record: Mapping[str, Any], task: str, origin: str) -> Document:
    """TRL's form: two texts, or two lists of turns; turns of the prompt are not learned."""
    form, prompt = "prompt and completion", record["prompt"]
    if not _is_conversation(prompt):
        messages = _exchange(_text(record, "prompt", origin), _text(record, "completion", origin))
        return _document(record, task, origin, form, messages)
    before, _ = _turns(prompt, f"{origin}: prompt")
    after, given = _turns(record.get("completion"), f"{origin}: completion")
    unlearned = {*range(len(before)), *(len(before) + index for index in given)}
    return _document(record, task, origin, form, [*before, *after], frozenset(unlearned))


def _from_text(record: Mapping[str, Any], task: str, origin: str) -> Document:
    return Document(task, [], origin, "text", text=_text(record, "text", origin))


# By identifying field; the first that is present decides.
_FORMS: dict[str, Callable[[Mapping[str, Any], str, str], Document]] = {
    "messages": _from_chat,
    "conversations": _from_chat,
    "instruction": _from_alpaca,
    "prompt": _from_prompt,
    "text": _from_text,
}


def _document(
    record: Mapping[str, Any],
    task: str,
    origin: str,
    form: str,
    turns: list[Message],
    given: frozenset[int] = frozenset(),
) -> Document:
    """The conversation, with the system message and the tools from other fields of the record."""
    if record.get("system") not in (None, "") and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": _text(record, "system", origin)}, *turns]
        given = frozenset(index + 1 for index in given)
    tools, choices = _tools(record, origin), _choices(record, turns[-1], origin)
    return Document(task, turns, origin, form, tools=tools, given=given, choices=choices)


def _choices(record: Mapping[str, Any], answer: Message, origin: str) -> tuple[str, ...]:
    """Two or more different texts or numbers, one of them the answer; a field with anything else is ignored."""
    choices = _parsed(record.get("choices"))
    if not isinstance(choices, list):
        return ()
    choices = [_number_as_text(choice) for choice in choices]
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return ()
    if answer["role"] != "assistant" or answer.get("content") not in choices:
        return ()
    if len({*choices}) < len(choices) or len(choices) < 2:
        return ()
    for choice in choices:
        _refuse_surrogates(choice, "choices", origin)
    return tuple(choices)


def _is_conversation(value: Any) -> bool:
    turns = _parsed(value)  # a question may also look like a list: "[3, 1, 2] in order?" or just "[3, 1, 2]"
    return (
        isinstance(turns, list) and bool(turns) and all(isinstance(t, dict) and {"role", "from"} & {*t} for t in turns)
    )


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _history(record: Mapping[str, Any], origin: str) -> list[Message]:
    """Earlier exchanges in the Alpaca form, as in LLaMA-Factory: [[question, answer], ...]."""
    history = _parsed(record.get("history") or [])
    if not isinstance(history, list):
        raise UserError(f"{origin}: field `history` is {_kind(history)}; expected a list of questions and answers")
    turns = []
    for index, pair in enumerate(history):
        where = f"{origin}: history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{where} is {_kind(pair)}; expected a list of a question and an answer")
        exchange = {"question": pair[0], "answer": pair[1]}
        turns += _exchange(_text(exchange, "question", where), _text(exchange, "answer", where))
    return turns


def _turns(value: Any, where: str) -> tuple[list[Message], frozenset[int]]:
    """Turns in OpenAI's or ShareGPT's spelling, and the indices of those that are not to be learned (weight 0)."""
    value = _parsed(value)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {_kind(value)}; expected a list of one or more turns, correct the record")
    turns = [_turn(turn, f"{where}[{index}]") for index, turn in enumerate(value)]
    weights = [turn.get("weight") for turn in value]
    for index, weight in enumerate(weights):
        if weight not in (None, 0, 1):
            raise UserError(
                f"{where}[{index}]: field `weight` is {weight!r}; expected 0 (not learned) or 1, correct it"
            )
    return turns, frozenset(index for index, weight in enumerate(weights) if weight == 0)


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {_kind(turn)}; expected an object with `role` and `content`")
    turn = {name: value for name, value in turn.items() if value is not None}  # table rows are filled up with nulls
    role_field, content_field = ("from", "value") if "from" in turn else ("role", "content")
    spelt = _text(turn, role_field, where)
    message: Message = {"role": _ROLES.get(spelt, spelt)}
    if spelt == "function_call" and content_field in turn:
        return {**message, "tool_calls": _tool_calls(turn[content_field], where)}
    if calls := _parsed(turn.get("tool_calls")) or turn.get("function_call"):
        message["tool_calls"] = _tool_calls(calls, where)
    if content_field in turn or "tool_calls" not in message:
        message["content"] = _content(turn, content_field, where)
    passed_on = _PASSED_ON if message["role"] != "tool" else (*_PASSED_ON, "name")
    message |= {name: _text(turn, name, where) for name in passed_on if name in turn}
    given = [name for name in _REASONING if turn.get(name) is not None]
    if message["role"] == "assistant" and given:
        message["reasoning_content"] = _text(turn, given[0], where)
    return message


def _content(turn: dict[str, Any], field: str, where: str) -> str:
    """The text of a turn; it may be in OpenAI's list of parts, if all parts are text."""
    parts = turn.get(field)
    if not isinstance(parts, list) or not parts:
        return _text(turn, field, where)
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            found = f"of type {part.get('type')!r}" if isinstance(part, dict) else f"that is {_kind(part)}"
            raise UserError(f"{where}: `{field}` has a part {found}; expected parts of text only, remove the record")
    return "".join(_text(part, "text", where) for part in parts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as templates expect them: with arguments as an object, parsed if they are JSON text."""
    value = _parsed(value)
    calls = value if isinstance(value, list) else [value]
    return [_tool_call(call, f"{where}: tool call {index}") for index, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} is {_kind(call)} without `name`; expected an object with `name` and `arguments`")
    arguments = _parsed(function.get("arguments") or {})
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: `arguments` is {_kind(arguments)}; expected an object, or one as JSON text")
    _refuse_no_json(arguments, "arguments", where)
    identity = {"id": _text(call, "id", where)} if call.get("id") is not None else {}
    name = _text(function, "name", where)
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(record: Mapping[str, Any], origin: str) -> list[dict[str, Any]] | None:
    tools = _parsed(record.get("tools") or None)
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{origin}: field `tools` is {_kind(tools)}; expected a list of JSON schemas")
    _refuse_no_json(tools, "tools", origin)
    return tools


def _parsed(value: Any) -> Any:
    """The list or object in a JSON text, as tables store them; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value, object_pairs_hook=without_repeats)
        except (ValueError, RecursionError):
            return value
    return value


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    if field not in record:
        advice = "add it, or name it under the source's `fields`" if field in _ANSWERS else "add the field"
        raise UserError(f"{where}: lacks field `{field}`; it has {_names(record)}, {advice}")
    value = _number_as_text(record[field])
    if value is None:
        raise UserError(f"{where}: field `{field}` is null; expected text, correct or remove the record")
    if isinstance(value, float):
        raise UserError(f"{where}: field `{field}` is {value}; expected text, correct or remove the record")
    if not isinstance(value, str):
        raise UserError(f"{where}: field `{field}` is {_kind(value)}; expected text, put it in quotes")
    _refuse_surrogates(value, field, where)
    return value


def _number_as_text(value: Any) -> Any:
    """A finite number as text; any other value unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return value if isinstance(value, float) and not math.isfinite(value) else str(value)


def _refuse_no_json(value: Any, field: str, where: str) -> None:
    """Refuses what a chat template cannot write as JSON, such as dates in tables, NaN, and deep nesting."""
    if not _is_shallow(value, DEEPEST):
        raise UserError(f"{where}: field `{field}` has over {DEEPEST} nested lists and objects; simplify it")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: field `{field}` is not JSON ({error}); correct it") from error
    _refuse_surrogates(text, field, where)


def _is_shallow(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in parts)


def _refuse_surrogates(text: str, field: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which tokenizers refuse
        raise UserError(
            f"{where}: field `{field}` holds half a surrogate pair at character {error.start}; remove it"
        ) from error


def _names(record: Mapping[str, Any]) -> str:
    """Sorted field names, the first twelve if there are more."""
    names = sorted(map(str, record))
    return str(names[:12]).removesuffix("]") + f", ... {len(names)} in total]" if len(names) > 12 else str(names)


def _kind(value: Any) -> str:
    names = {
        type(None): "null", bool: "true or false", int: "number", float: "number", list: "list", dict: "object",
        str: "text",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__) if value != [] else "an empty list"
