"""Records made into documents, for tests of the forms that records come in."""

from typing import Any

import pytest

from data_prep.documents import Document
from data_prep.forms import to_document
from data_prep.user_error import UserError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": [2]}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "default": None}}}]


def document(record: dict[str, Any]) -> Document:
    found = to_document(record, "sums", "a.jsonl:3")
    assert (found.task, found.origin) == ("sums", "a.jsonl:3")
    return found


def turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in document(record).messages]


def learned(record: dict[str, Any]) -> list[str]:
    """Contents of the turns that are learned."""
    found = document(record)
    return [found.messages[index]["content"] for index in found.learned_turns(last_only=False)]


def refusal(record: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        document(record)
    message = str(caught.value)
    assert message.splitlines() == [message] and message.startswith("a.jsonl:3: ")
    return message.removeprefix("a.jsonl:3: ")
