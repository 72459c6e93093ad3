"""A document: one conversation or one text, the unit that is split, labelled and packed."""

import hashlib
import json
import unicodedata
import zlib
from dataclasses import dataclass
from typing import Any, TypeAlias

# {"role": ..., "content": text}; an assistant turn with "tool_calls" may have no content
Message: TypeAlias = dict[str, Any]

END_OF_REASONING = "</think>"  # within the content of an assistant turn


@dataclass(frozen=True, slots=True)
class Document:
    """One conversation or one text of one task, as in the source (no system message added yet)."""

    task: str
    messages: list[Message]  # empty if `text` is given
    origin: str  # its place in the source: "file:line" or "generator[index]"
    form: str = "chat"  # form of its record: Alpaca, ShareGPT, ...
    text: str | None = None  # learned entirely, without chat template
    tools: list[dict[str, Any]] | None = None  # JSON schemas, for the chat template
    settings: dict[str, Any] | None = None  # values for variables of the chat template, such as enable_thinking
    given: frozenset[int] = frozenset()  # indices of assistant turns that belong to the question and are not learned
    choices: tuple[str, ...] = ()  # possible answers; a model should rate the last turn's the likeliest
    unread: tuple[str, ...] = ()  # what its record says beyond this, such as "column lang"

    def learned_turns(self, last_only: bool) -> list[int]:
        """Indices of the assistant turns to learn; with `last_only`, of the last of them."""
        turns = [i for i, turn in enumerate(self.messages) if turn["role"] == "assistant" and i not in self.given]
        return turns[-1:] if last_only else turns

    def learned_mark(self, last_only: bool) -> int:
        """A number below 2**32; it differs where equal conversations have different turns to learn, or settings."""
        learned = self.learned_turns(last_only)
        turns = bytes(i in learned for i, turn in enumerate(self.messages) if turn["role"] == "assistant")
        return zlib.crc32(turns + (json.dumps(self.settings, sort_keys=True).encode() if self.settings else b""))

    def digest(self, seed: int, system_prompt: str | None) -> bytes:
        """16 bytes that depend on the seed and the normalized text only, not on task or source.

        They identify copies, decide the held-out split and set the order, so all of these stay when data is added. A
        first turn equal to the recipe's system prompt is ignored, since conversations without one get it anyway.
        """
        turns = [_normalize(turn) for turn in self.messages]
        if system_prompt is not None and turns[:1] == [{"role": "system", "content": normalize_text(system_prompt)}]:
            turns = turns[1:]
        content = [seed, turns, _normalize(self.text), _normalize(self.tools)]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


def reasoning_parts(turn: Message) -> list[str]:
    """The reasoning of an assistant turn: in its separate field, and before `</think>` in its content."""
    before = (turn.get("content") or "").rpartition(END_OF_REASONING)[0].strip().removeprefix("<think>")
    return [part for part in ((turn.get("reasoning_content") or "").strip(), before.strip()) if part]


def normalize_text(text: str) -> str:
    """The text in NFC, without outer whitespace, blanks and tabs at line ends, and carriage returns.

    Nothing else: indentation, case and inner blanks can be what a task is about.
    """
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if " \n" in text or "\t\n" in text:
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return text.strip()


def _normalize(value: Any) -> Any:
    if isinstance(value, str):
        return normalize_text(value)
    if isinstance(value, dict):
        return {key: _normalize(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_normalize(part) for part in value]
    return value


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """The conversation with `system_prompt` prepended, if one is given and the conversation has no system message."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
