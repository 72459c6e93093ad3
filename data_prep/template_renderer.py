"""Calls a tokenizer's chat template. The only module that knows transformers' template functions (5.23)."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError

from data_prep.documents import Message
from data_prep.user_error import UserError

Span = tuple[int, int]  # first character, and one past the last
Tools = list[dict[str, Any]] | None  # JSON schemas

TEMPLATE_SETTINGS = "chat_template_kwargs"  # how records, transformers and vLLM name a template's own variables
RESERVED_SETTINGS = frozenset(  # what transformers' functions take under these names, or templates get from them
    (
        "messages", "conversation", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "return_assistant_tokens_mask", "tokenize", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "tokenizer_kwargs", "raise_exception", "strftime_now",
    )
)  # fmt: skip

_MARK = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
# What templates raise themselves, and what they run into: a string joined to a dictionary, a missing key, ...
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError)


class TemplateRenderer:
    """Writes conversations with the chat template of one tokenizer, exactly as given: null fields are passed on.

    settings: values for variables of the template's own.
    """

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any] | None = None):
        self._tokenizer = tokenizer
        self._settings = dict(settings or {})
        self._has_marks: dict[str, bool] = {}  # by template: a tokenizer can have one for tools

    def text(
        self, messages: Sequence[Message], origin: str, tools: Tools = None, generation_prompt: bool = False
    ) -> str:
        """The conversation's text. Raises UserError, naming `origin`, with the template's words if it refuses it."""
        return self._render(messages, origin, tools, add_generation_prompt=generation_prompt)[0]

    def marks(self, messages: Sequence[Message], origin: str, tools: Tools = None) -> list[Span] | None:
        """The spans that the template puts between `{% generation %}` and `{% endgeneration %}`; None if it has no such
        marks."""
        template = self._tokenizer.get_chat_template(None, tools or None)
        if template not in self._has_marks:
            self._has_marks[template] = _MARK.search(template) is not None
        if not self._has_marks[template]:
            return None
        return self._render(messages, origin, tools, return_assistant_tokens_mask=True)[1]

    def mentions(self, name: str) -> bool:
        """Whether the template, or one of several, holds this name."""
        templates = self._tokenizer.chat_template
        word = re.compile(rf"\b{re.escape(name)}\b")
        return any(map(word.search, templates.values() if isinstance(templates, dict) else [templates]))

    def _render(
        self, messages: Sequence[Message], origin: str, tools: Tools, **options: bool
    ) -> tuple[str, list[Span]]:
        try:
            texts, marks = _write(
                conversations=[list(messages)],
                tools=tools or None,
                chat_template=self._tokenizer.get_chat_template(None, tools or None),
                **options,
                **self._settings,
                **self._tokenizer.special_tokens_map,
            )
        except _REFUSALS as error:
            raise _refusal(messages, origin, error) from error
        return texts[0], marks[0] if marks else []


def generation_stops(tokenizer: Any) -> set[str]:
    """The tokens that end a generation, from the generation_config.json beside the tokenizer; empty without it."""
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config.get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return set()
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return {token for token in tokenizer.convert_ids_to_tokens(ids) if token}


def _write(**arguments: Any) -> tuple[list[str], list[list[Span]]]:
    """What transformers renders, and the marked spans; it is imported late, since it imports much and reads HF_HOME."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return cast(tuple[list[str], list[list[Span]]], render_jinja_template(**arguments))  # its annotation says str


def _refusal(messages: Sequence[Message], origin: str, error: Exception) -> UserError:
    roles = ", ".join(message["role"] for message in messages)
    cause = " ".join(str(error).split())
    late = next((index for index, message in enumerate(messages) if index and message["role"] == "system"), None)
    hint = "" if late is None else f", for example make messages[{late}] (system) a user turn"
    return UserError(
        f"{origin}: the tokenizer's chat template refuses turns of {roles}: {cause}; correct the conversation{hint}"
    )
