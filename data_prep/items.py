"""Held-out items: a conversation up to its last answer, and that answer, for generation to be asked and scored."""

import json

from data_prep.config import DataConfig
from data_prep.documents import Document, with_system_prompt


def item_of(document: Document, config: DataConfig) -> bytes:
    """One line of items.jsonl; empty where there is no answer in words, as in a plain text or after a tool call."""
    turns = document.learnt_turns(last_only=True)
    if not turns or turns[-1] == 0:  # nothing is learnt, or nothing is asked
        return b""
    answer = document.messages[turns[-1]].get("content")
    if not answer or not answer.strip():
        return b""
    item = {
        "task": document.task,
        "messages": with_system_prompt(document.messages[: turns[-1]], config.system_prompt),
        "answer": answer,
        **({"tools": document.tools} if document.tools else {}),
    }
    return json.dumps(item, ensure_ascii=False).encode() + b"\n"
