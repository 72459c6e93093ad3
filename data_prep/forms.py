"""Turns records into documents. The form of a record (chat, Alpaca, ...) is recognized by its fields.

Fields that no form reads are listed with the document. A record of no known form, or of a form that cannot be learned
from, is refused with its place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_prep.config import FieldName
from data_prep.documents import Document, Message, normalize_text
from data_prep.fields import TOOLS, Fields, Spellings, refuse_media
from data_prep.template_renderer import RESERVED_SETTINGS, TEMPLATE_SETTINGS
from data_prep.tool_calls import read_tools
from data_prep.turns import Turn, conversation, exchange, read_turns, refuse_unlearned
from data_prep.user_error import UserError
from data_prep.values import (
    as_json,
    as_object,
    decoded,
    is_empty,
    kind_of,
    number_as_text,
    parsed,
    refuse_surrogates,
    shown_names,
    text_of,
)

_PREFERENCES = (("chosen", "rejected"), ("prompt", "completion", "label"))  # TRL's paired and unpaired preferences
_VERDICTS = ("true", "false", "1", "0")  # values of `label` in unpaired preferences
_VERDICT = Spellings({"verdict": ("label", "kto_tag")})  # beside a chat, as in ms-swift and LLaMA-Factory
_OPTIONAL = ("input", "history", "system", "tools", "choices")  # fields that a record may lack
_BESIDE = Spellings(  # fields beside any conversation
    {
        "system": (
            "system", "system_prompt", "system_message", "system_msg", "sys_prompt", "sys_msg", "system_instruction",
            "system_instructions",
        ),
        "tools": TOOLS,
        "settings": (TEMPLATE_SETTINGS, "template_kwargs", "chat_template_args"),
    }
)  # fmt: skip
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
    refuse_media(record, origin)
    refuse_unlearned(record, origin)
    for field, form in _FORMS.items():
        if record.get(field) is not None:
            return form(record, task, origin)
    if missing := next((field for field in _FORMS if field in record), None):
        raise UserError(f"{origin}: field `{missing}` is null; correct or remove the record")
    raise UserError(f"{origin}: fields {shown_names(record)}; {_EXPECTED}")


def rename_fields(record: Mapping[str, Any], fields: Mapping[FieldName, str], origin: str) -> Mapping[str, Any]:
    """The record with known names for the fields that the recipe maps; optional ones may be absent.

    If the recipe maps a field that identifies a form, the record is of that form: the identifying fields of other forms
    get names that no form reads, as do fields whose meaning the recipe gives to another one.
    """
    if not fields:
        return record
    mapped = {ours for ours, theirs in fields.items() if theirs in record} | (
        {*_FORMS} if _FORMS.keys() & fields.keys() else set()
    )
    named = {}
    for name, value in record.items():
        if name not in fields.values():
            is_replaced = name in mapped or _BESIDE.meaning(name) in mapped
            named[f"{name} (the recipe's `fields` name another)" if is_replaced else name] = value
    for ours, theirs in fields.items():
        if theirs in record:
            named[ours] = record[theirs]
        elif ours not in _OPTIONAL:
            raise UserError(
                f"{origin}: lacks field `{theirs}`, which the source's `fields` names for `{ours}`; it has "
                f"{shown_names(record)}, correct the recipe or the record"
            )
    return named


def _from_chat(record: Mapping[str, Any], task: str, origin: str) -> Document:
    for field, value in record.items():
        if _VERDICT.meaning(field) and str(decoded(value)).lower() in ("true", "false"):
            raise UserError(
                f"{origin}: a preference row (`{field}` is {value!r}), but this trainer learns from answers; keep the "
                "records with good answers and remove the field"
            )
    name = "messages" if record.get("messages") is not None else "conversations"
    form = "chat" if name == "messages" else "ShareGPT"
    return _document(record, task, origin, form, [name], read_turns(record[name], f"{origin}: {name}"))


def _from_alpaca(record: Mapping[str, Any], task: str, origin: str) -> Document:
    question = text_of(record, "instruction", origin)
    if record.get("input") not in (None, ""):
        question = "\n\n".join(filter(None, (question, text_of(record, "input", origin))))
    turns = [*_history(record, origin), *exchange(question, text_of(record, "output", origin))]
    return _document(record, task, origin, "Alpaca", ["instruction", "input", "output", "history"], turns)


def _from_prompt(record: Mapping[str, Any], task: str, origin: str) -> Document:
    """TRL's form: two texts, or two lists of turns; turns of the prompt are not learned."""
    prompt = record["prompt"]
    if _is_conversation(prompt):
        before = [replace(turn, learned=False) for turn in read_turns(prompt, f"{origin}: prompt")]
        turns = [*before, *read_turns(record.get("completion"), f"{origin}: completion")]
    else:
        turns = exchange(text_of(record, "prompt", origin), text_of(record, "completion", origin))
    return _document(record, task, origin, "prompt and completion", ["prompt", "completion"], turns)


def _from_text(record: Mapping[str, Any], task: str, origin: str) -> Document:
    unread = tuple(f"column {name}" for name, value in record.items() if name != "text" and not is_empty(value))
    return Document(task, [], origin, "text", text=text_of(record, "text", origin), unread=unread)


# By identifying field; the first that is present decides.
_FORMS: dict[str, Callable[[Mapping[str, Any], str, str], Document]] = {
    "messages": _from_chat,
    "conversations": _from_chat,
    "instruction": _from_alpaca,
    "prompt": _from_prompt,
    "text": _from_text,
}


def _document(
    record: Mapping[str, Any], task: str, origin: str, form: str, read: Sequence[str], turns: list[Turn]
) -> Document:
    """The conversation, with the system message and the tools from other fields of the record.

    read: the fields of the record that the turns are from.
    """
    fields = Fields(record, _BESIDE, origin)
    fields.remove(*read)
    settings = _settings(fields)
    found = conversation(_with_system(fields, turns), read_tools(fields))
    choices = _choices(record, turns[-1].message, origin)
    if choices:
        fields.remove("choices")
    unread = (*(f"column {name}" for name in fields.left), *sorted(found.unread))
    return Document(
        task,
        found.messages,
        origin,
        form,
        tools=found.tools,
        settings=settings,
        given=found.given,
        choices=choices,
        unread=unread,
    )


def _settings(fields: Fields) -> dict[str, Any] | None:
    """The values that a record gives to variables of the chat template, without nulls; None if it has none."""
    name = fields.take("settings")
    if name is None or is_empty(fields.values[name]):
        return None
    found = as_object(fields.values[name])
    if not isinstance(found, dict):
        raise UserError(f"{fields.where}: field `{name}` is {kind_of(found)}; expected an object of settings")
    settings = {key: value for key, value in as_json(found, name, fields.where).items() if value is not None}
    for key, value in settings.items():
        if key in RESERVED_SETTINGS or key.endswith("_token"):
            raise UserError(
                f"{fields.where}: `{name}` sets `{key}` to {kind_of(value)}; expected only variables of the chat "
                "template's own, such as enable_thinking; remove it"
            )
    return settings or None


def _with_system(fields: Fields, turns: list[Turn]) -> list[Turn]:
    """The turns, after the system message that the record has in a field of its own.

    The field is not read if the turns begin with another system message that says something.
    """
    name = fields.take("system")
    if name is None or decoded(fields.values[name]) == "":
        return turns
    content = text_of(fields.values, name, fields.where)
    first = turns[0].message
    if first["role"] != "system":
        return [Turn({"role": "system", "content": content}, fields.where), *turns]
    if not first["content"].strip():
        return [replace(turns[0], message={**first, "content": content}), *turns[1:]]
    is_same = normalize_text(first["content"]) == normalize_text(content)
    return turns if is_same else [replace(turns[0], unread=turns[0].unread | {f"column {name}"}), *turns[1:]]


def _choices(record: Mapping[str, Any], answer: Message, origin: str) -> tuple[str, ...]:
    """Two or more different texts or numbers, one of them the answer; a field with anything else is ignored."""
    choices = parsed(record.get("choices"))
    if not isinstance(choices, list):
        return ()
    choices = [number_as_text(decoded(choice)) for choice in choices]
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return ()
    if answer["role"] != "assistant" or answer.get("content") not in choices:
        return ()
    if len({*choices}) < len(choices) or len(choices) < 2:
        return ()
    for choice in choices:
        refuse_surrogates(choice, "choices", origin)
    return tuple(choices)


def _is_conversation(value: Any) -> bool:
    turns = parsed(value)  # a question may also look like a list: "[3, 1, 2] in order?" or just "[3, 1, 2]"
    return (
        isinstance(turns, list) and bool(turns) and all(isinstance(t, dict) and {"role", "from"} & {*t} for t in turns)
    )


def _history(record: Mapping[str, Any], origin: str) -> list[Turn]:
    """Earlier exchanges in the Alpaca form, as in LLaMA-Factory: [[question, answer], ...]."""
    history = parsed(record.get("history") or [])
    if not isinstance(history, list):
        raise UserError(f"{origin}: field `history` is {kind_of(history)}; expected a list of questions and answers")
    turns = []
    for index, pair in enumerate(history):
        where = f"{origin}: history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{where} is {kind_of(pair)}; expected a list of a question and an answer")
        texts = {"question": pair[0], "answer": pair[1]}
        turns += exchange(text_of(texts, "question", where), text_of(texts, "answer", where))
    return turns
