"""Renders conversations with the tokenizer's chat template and labels the assistant turns in the text.

Each conversation is rendered twice: with markers in place of contents, which gives the template's own text (the
skeleton, cached by sequence of roles), and as it is. Walking along the skeleton shows where each turn begins and ends,
even if the template strips whitespace, adds a system prompt or an empty reasoning block, or drops reasoning from
earlier turns. If the walk fails, it is repeated with all assistant turns verbatim. No token id and no template is
special-cased.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jinja2 import TemplateError

from data_prep.answer_spans import answer_spans
from data_prep.chat_skeleton import Header, MarkedConversation, Skeleton, Span, is_answer, read_skeleton, unreadable
from data_prep.documents import Message, reasoning_parts
from data_prep.user_error import UserError

_PLAIN = {"role", "content"}  # the fields of a message whose skeleton depends on its role only

_ANSWER = "<<answer>>"


def check_offsets(tokenizer: Any) -> None:
    """Raises UserError if the tokenizer gives no character offsets, which labels need."""
    if not tokenizer.is_fast:
        raise UserError(
            f"base.model: {type(tokenizer).__name__} gives no character offsets, which labels need; use a model with "
            "a tokenizer.json"
        )


class ChatTemplate:
    """The chat template of one tokenizer.

    Raises UserError if the tokenizer has no chat template or gives no character offsets.
    """

    def __init__(self, tokenizer: Any):
        check_offsets(tokenizer)
        if not tokenizer.chat_template:
            raise UserError(
                f"base.model: the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; use an "
                "instruction-tuned model, or name a Jinja file under data.chat_template"
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise UserError(
                f"base.model: the tokenizer's chat templates are {names}, and none is the default; name a Jinja file "
                "under data.chat_template"
            )
        self._tokenizer = tokenizer
        specials = {token.content for token in tokenizer.added_tokens_decoder.values()}
        longest_first = sorted(specials, key=lambda token: (-len(token), token))
        self._end_pattern = re.compile(r"\s*(?:" + "|".join(map(re.escape, longest_first)) + ")") if specials else None
        self._skeletons: dict[tuple[str, ...], Skeleton] = {}
        self._prompts: dict[tuple[Any, ...], Header] = {}

    def render(
        self, messages: Sequence[Message], origin: str, tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, dict[int, Span]]:
        """The conversation's text, and the span of every assistant turn, in order, by index into `messages`.

        A span begins where the generation prompt ends and ends with the end token, so it is exactly what the model
        has to write, tool calls included. `tools` are JSON schemas for the template.
        Raises UserError, naming `origin`, if the template refuses the conversation or leaves out a part of it other
        than the reasoning of answers before the last.
        """
        text = self._text(messages, origin, tools)
        roles = tuple([message["role"] for message in messages if message.keys() == _PLAIN])
        if not tools and len(roles) == len(messages):
            skeleton = self._skeleton_of_roles(roles, origin)
        else:
            skeleton = self._skeleton_of(messages, origin, tools, text, _has_calls)
        spans = answer_spans(text, messages, skeleton)
        if spans is None:  # an answer can change the template's text around it, for example through its reasoning
            spans = answer_spans(text, messages, self._skeleton_of(messages, origin, tools, text, is_answer))
        if spans is None:
            raise unreadable(origin)
        _check_reasoning(text, spans, messages, origin)
        return text, spans

    def prompt(
        self,
        messages: Sequence[Message],
        origin: str,
        tools: list[dict[str, Any]] | None = None,
        answer: Message | None = None,
    ) -> str:
        """The text to generate an answer from: what precedes the content of an answer to `messages` in training.

        It includes what the template writes before every answer, such as Qwen3's empty reasoning block. If `answer`,
        the expected one, has reasoning, the text ends before the assistant turn instead, so the model reasons itself.
        Raises UserError as `render` does.
        """
        if answer and reasoning_parts(answer):
            text, spans = self.render([*messages, answer], origin, tools)
            return text[: spans[len(messages)][0]]
        text, spans = self.render([*messages, {"role": "assistant", "content": _ANSWER}], origin, tools)
        return text[: text.index(_ANSWER, spans[len(messages)][0])]

    def end_token(self) -> str:
        """The special token that ends an ordinary assistant turn; empty if there is none, so models never learn to
        stop."""
        answer = self._skeleton_of_roles(("user", "assistant"), "the chat template").turns[-1]
        return answer.after[: answer.closing].strip()

    def writes_dates(self) -> bool:
        """Whether the template writes the current date, as Llama-3.1's does."""
        templates = self._tokenizer.chat_template
        return any("strftime_now" in t for t in (templates.values() if isinstance(templates, dict) else [templates]))

    def _text(
        self,
        messages: Sequence[Message],
        origin: str,
        tools: list[dict[str, Any]] | None = None,
        generation_prompt: bool = False,
    ) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=tools or None, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (TemplateError, TypeError) as error:  # TypeError: a template that joins a string and, say, a dictionary
            roles = ", ".join(message["role"] for message in messages)
            cause = " ".join(str(error).split())
            raise UserError(
                f"{origin}: the tokenizer's chat template refuses turns of {roles}: {cause}; correct the conversation"
            ) from error

    def _skeleton_of_roles(self, roles: tuple[str, ...], origin: str) -> Skeleton:
        """The skeleton of every conversation with these roles whose messages have a role and content only."""
        if roles not in self._skeletons:
            messages = [{"role": role, "content": ""} for role in roles]
            marked = MarkedConversation(partial(self._text, origin=origin), self._prompts, messages)
            self._skeletons[roles] = read_skeleton(marked, self._end_pattern, origin)
        return self._skeletons[roles]

    def _skeleton_of(
        self,
        messages: Sequence[Message],
        origin: str,
        tools: list[dict[str, Any]] | None,
        text: str,
        is_verbatim: Callable[[Message], bool],
    ) -> Skeleton:
        """The skeleton of one conversation, whose rendered text is `text`."""
        tag = "turn"
        while f"<<{tag}:" in text:  # no text of the conversation may look like a marker
            tag += "_"
        verbatim = frozenset(index for index, message in enumerate(messages) if is_verbatim(message))
        write = partial(self._text, origin=origin)
        marked = MarkedConversation(write, self._prompts, messages, tools, verbatim, tag, self.end_token())
        return read_skeleton(marked, self._end_pattern, origin)


def _has_calls(message: Message) -> bool:
    return is_answer(message) and bool(message.get("tool_calls"))


def _check_reasoning(text: str, spans: dict[int, Span], messages: Sequence[Message], origin: str) -> None:
    """Raises UserError if the last answer's reasoning is not in its span."""
    for index in [*spans][-1:]:
        if not all(part in text[slice(*spans[index])] for part in reasoning_parts(messages[index])):
            raise UserError(
                f"{origin}: the tokenizer's chat template leaves out the reasoning of messages[{index}], the last "
                "answer; name one that writes it under data.chat_template, or remove the reasoning from the record"
            )
