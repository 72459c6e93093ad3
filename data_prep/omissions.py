"""What a chat template leaves out of a conversation's answers: some of it is refused, some is reported."""

import json
import re
from collections.abc import Mapping, Sequence

from data_prep.documents import END_OF_REASONING, Message, reasoning_parts
from data_prep.template_renderer import Span
from data_prep.user_error import UserError


def check_reasoning(text: str, spans: dict[int, Span], messages: Sequence[Message], origin: str) -> None:
    """Raises UserError if the last answer's reasoning is not in its span."""
    for index in [*spans][-1:]:
        if not all(part in text[slice(*spans[index])] for part in reasoning_parts(messages[index])):
            raise UserError(
                f"{origin}: the tokenizer's chat template leaves out the reasoning of messages[{index}], the last "
                "answer; name one that writes it under data.chat_template, or remove the reasoning from the record"
            )


def check_arguments(text: str, spans: dict[int, Span], messages: Sequence[Message], origin: str) -> None:
    """Raises UserError if the name of a call's argument is not in its turn. Names that JSON would escape may differ."""
    for index, span in spans.items():
        for call in messages[index].get("tool_calls") or ():
            arguments = call["function"]["arguments"]
            names = json.loads(arguments) if isinstance(arguments, str) else arguments
            turn = text[slice(*span)]
            if missing := next((name for name in names if re.fullmatch(r"\w+", name) and name not in turn), None):
                raise UserError(
                    f"{origin}: the tokenizer's chat template leaves out argument {missing!r} of a call in "
                    f"messages[{index}]; name one that writes it under data.chat_template"
                )


def omissions(text: str, spans: Mapping[int, Span], messages: Sequence[Message]) -> list[str]:
    """What the template leaves out of answers as a rule, as Llama-3.1's does with text beside calls, and Qwen3's with
    the reasoning of all but the last answers."""
    texts, reasoning = False, False
    for index, span in spans.items():
        message = messages[index]
        thoughts = reasoning_parts(message)
        if not thoughts and not message.get("tool_calls"):
            continue  # most are like this; it saves time
        turn, content = text[slice(*span)], (message.get("content") or "").rpartition(END_OF_REASONING)[2].strip()
        texts |= bool(message.get("tool_calls")) and content not in turn
        reasoning |= not all(part in turn for part in thoughts)
    return ["text beside calls"] * texts + ["reasoning of earlier answers"] * reasoning
