"""Other spellings of a conversation with tool calls, for templates that refuse the usual one.

Some templates join arguments as text, test that a call has no content with `is none`, or want ids of nine characters.
"""

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from string import ascii_letters, digits

from data_prep.documents import Message

_NINE = re.compile("[a-zA-Z0-9]{9}")

_Respell = Callable[[list[Message]], list[Message]]


def spellings(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The conversation as given, without null fields, then every other spelling of its tool calls, usual ones first."""
    given = [
        {name: value for name, value in message.items() if value is not None} if None in message.values() else message
        for message in messages
    ]
    yield given
    if not any(message.get("tool_calls") or message["role"] == "tool" for message in given):
        return
    tried = [given]
    for parts in product((_as_given, _with_ids_of_nine), (_as_given, _null, _empty), (_as_given, _with_text_arguments)):
        spelt = given
        for respell in parts:
            spelt = respell(spelt)
        if spelt not in tried:
            tried.append(spelt)
            yield spelt


def _as_given(messages: list[Message]) -> list[Message]:
    return messages


def _null(messages: list[Message]) -> list[Message]:
    return [{**message, "content": None} if _only_calls(message) else message for message in messages]


def _empty(messages: list[Message]) -> list[Message]:
    return [{**message, "content": ""} if _only_calls(message) else message for message in messages]


def _only_calls(message: Message) -> bool:
    return bool(message.get("tool_calls")) and not message.get("content")


def _with_text_arguments(messages: list[Message]) -> list[Message]:
    """The same with the arguments of calls as JSON text."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_text(call: dict) -> dict:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _with_ids_of_nine(messages: list[Message]) -> list[Message]:
    """The same with an id of nine letters and digits for every call; results get their call's, in order if they have
    none."""
    spelt, unanswered = [], deque[str]()
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            calls = [
                {**call, "id": _nine(call.get("id") or f"{index}.{number}")}
                for number, call in enumerate(message["tool_calls"])
            ]
            unanswered = deque(call["id"] for call in calls)
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            given = message.get("tool_call_id")
            own = _nine(given) if given else unanswered[0] if unanswered else None
            if own and own in unanswered:
                unanswered.remove(own)
            message = {**message, "tool_call_id": own} if own else message
        spelt.append(message)
    return spelt


def _nine(identity: str) -> str:
    """The id itself if it has nine letters and digits, else nine that depend on it only."""
    if _NINE.fullmatch(identity):
        return identity
    number = int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest())
    alphabet = ascii_letters + digits
    return "".join(alphabet[number // len(alphabet) ** place % len(alphabet)] for place in range(9))
