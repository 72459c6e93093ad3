"""A document: one conversation, the unit that is split, labelled and packed."""

import hashlib
import json
from dataclasses import dataclass
from typing import TypeAlias

Message: TypeAlias = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True, slots=True)
class Document:
    """One conversation of one task, as it stands in the source (no system message added yet)."""

    task: str
    messages: list[Message]
    origin: str  # where a person finds it: "file:line" or "generator[index]"

    def answer_index(self) -> int | None:
        """Index of the last assistant turn, None where there is none."""
        turns = range(len(self.messages) - 1, -1, -1)
        return next((i for i in turns if self.messages[i]["role"] == "assistant"), None)

    def digest(self, seed: int) -> bytes:
        """32 bytes that depend on nothing but the seed and the turns (outer whitespace ignored, task left out).

        They decide the held-out split and break ties of order, so that neither moves when data is added elsewhere.
        """
        turns = [(message["role"], message["content"].strip()) for message in self.messages]
        return hashlib.sha256(json.dumps([seed, turns]).encode()).digest()


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """The conversation with `system_prompt` in front, where one is given and the conversation has none."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
