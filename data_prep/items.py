"""Held-out items, for generating and scoring answers: a conversation up to its last answer, and that answer.

Keys of a line of items.jsonl; the last five are optional:

    task      name of the task
    messages  the conversation up to the answer, the recipe's system prompt included: [{"role", "content", ...}, ...]
    answer    text that the model should write
    reasoning_content
              text that the model should write before it, if the record has it in a separate field
    tools     JSON schemas, for the chat template
    chat_template_kwargs
              values for variables of the chat template, such as enable_thinking, if the record has them
    choices   two or more different texts, one of them `answer`; the model chooses the likeliest
    metric    the recipe's metric for the task: exact_match, choices, token_f1 or rouge_l; absent: choices if the item
              has them, else exact_match. With metric choices every item has choices.
"""

import json
from typing import Any

from data_prep.config import DataConfig
from data_prep.documents import Document, Message, with_system_prompt
from data_prep.template_renderer import TEMPLATE_SETTINGS
from data_prep.user_error import UserError


def held_out_item(document: Document, config: DataConfig) -> bytes:
    """One line of items.jsonl; empty if the document has no answer in words, for example a plain text or a tool call.

    Raises UserError if the task's metric is `choices` and the document has none.
    """
    turns = document.learned_turns(last_only=True)
    if not turns or turns[-1] == 0:  # nothing is learned, or there is no question
        return b""
    answer = document.messages[turns[-1]]
    if not (answer.get("content") or "").strip():
        return b""
    metric = config.metrics[document.task]
    if metric == "choices" and not document.choices:
        raise UserError(
            f"{document.origin}: metric `choices` of task {document.task!r} needs a field `choices`, a list of "
            "different texts with the answer among them; add it, or choose another metric"
        )
    item = {
        "task": document.task,
        "messages": with_system_prompt(document.messages[: turns[-1]], config.system_prompt),
        "answer": answer["content"],
        **_reasoning(answer),
        **({"tools": document.tools} if document.tools else {}),
        **({TEMPLATE_SETTINGS: document.settings} if document.settings else {}),
        **({"choices": list(document.choices)} if document.choices else {}),
        **({"metric": metric} if metric else {}),
    }
    return json.dumps(item, ensure_ascii=False).encode() + b"\n"


def answer_of(item: dict[str, Any]) -> Message:
    """The turn that the model should write, reasoning included."""
    return {"role": "assistant", "content": item["answer"], **_reasoning(item)}


def _reasoning(fields: dict[str, Any]) -> dict[str, Any]:
    return {"reasoning_content": fields["reasoning_content"]} if fields.get("reasoning_content") else {}
