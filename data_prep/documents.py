"""A document: one conversation or one text, the unit that is split, labelled and packed."""

import hashlib
import json
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

# {"role": ..., "content": text}; an assistant turn with "tool_calls" may have no content
Message: TypeAlias = dict[str, Any]

END_OF_REASONING = "</think>"  # within the content of an assistant turn


@dataclass(frozen=True, slots=True)
class Document:
    """One conversation, or one text, of one task, as it stands in the source (no system message added yet)."""

    task: str
    messages: list[Message]  # none where `text` is given
    origin: str  # where a person finds it: "file:line" or "generator[index]"
    form: str = "chat"  # of the record it was: Alpaca, ShareGPT, ...
    text: str | None = None  # learned as a whole, without chat template
    tools: list[dict[str, Any]] | None = None  # JSON schemas, for the chat template
    given: frozenset[int] = frozenset()  # assistant turns that are part of the question, and not learned
    choices: tuple[str, ...] = ()  # answers of which a model is to find the last answer the likeliest

    def learned_turns(self, last_only: bool) -> list[int]:
        """Indices of the assistant turns to learn; of the last one only, where asked for."""
        turns = [i for i, turn in enumerate(self.messages) if turn["role"] == "assistant" and i not in self.given]
        return turns[-1:] if last_only else turns

    def learned_mark(self, last_only: bool) -> int:
        """A number under 2**32 that differs where, of the same turns, others are learned."""
        learned = self.learned_turns(last_only)
        return zlib.crc32(bytes(i in learned for i, turn in enumerate(self.messages) if turn["role"] == "assistant"))

    def digest(self, seed: int, system_prompt: str | None) -> bytes:
        """16 bytes that depend on nothing but the seed and the text, normalised; task and source are left out.

        They tell copies, decide the held-out split and set the order, so that none of these moves when data is added.
        A first turn that is the recipe's system prompt does not count: it is in front of all that have none.
        """
        turns = [_normalised(turn) for turn in self.messages]
        if system_prompt is not None and turns[:1] == [{"role": "system", "content": normalised(system_prompt)}]:
            turns = turns[1:]
        content = [seed, turns, _normalised(self.text), _normalised(self.tools)]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


def reasoning_parts(turn: Message) -> list[str]:
    """What an assistant turn thinks before it answers: in a field of its own, and in its content."""
    before = (turn.get("content") or "").rpartition(END_OF_REASONING)[0].strip().removeprefix("<think>")
    return [part for part in ((turn.get("reasoning_content") or "").strip(), before.strip()) if part]


def normalised(text: str) -> str:
    """The text in Unicode's composed form, without outer white space, trailing blanks and tabs, and carriage returns.

    No more than that: indentation, case and inner blanks can be what a task is about.
    """
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if " \n" in text or "\t\n" in text:
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return text.strip()


def _normalised(value: Any) -> Any:
    if isinstance(value, str):
        return normalised(value)
    if isinstance(value, Mapping):
        return {key: _normalised(part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [_normalised(part) for part in value]
    return value


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """The conversation with `system_prompt` in front, where one is given and the conversation has none."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
