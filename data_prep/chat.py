"""Renders conversations with the tokenizer's chat template and labels the assistant turns in the text.

Each conversation is rendered twice: with markers in place of contents, which gives the template's own text (the
skeleton, cached by sequence of roles), and as it is. Walking along the skeleton shows where each turn begins and ends,
even if the template strips whitespace, adds a system prompt or an empty reasoning block, or drops reasoning from
earlier turns. If the walk fails, it is repeated with all assistant turns verbatim, then with system turns verbatim. No
token id and no template is special-cased.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from data_prep.answer_spans import answer_spans, spans_by_beginnings
from data_prep.chat_skeleton import Skeleton, read_skeleton, unreadable
from data_prep.documents import Message, reasoning_parts
from data_prep.marked_conversation import Header, MarkedConversation, is_answer
from data_prep.omissions import check_arguments, check_reasoning
from data_prep.spellings import spellings
from data_prep.template_renderer import TEMPLATE_SETTINGS, Span, TemplateRenderer, Tools, generation_stops
from data_prep.turn_ends import TurnEnds, find_turn_ends
from data_prep.user_error import UserError

_PLAIN = {"role", "content"}  # the fields of a message whose skeleton depends on its role only
_MOST_SETTINGS = 64  # kept at a time; records may name dates in theirs
_ANSWER = "<<answer>>"
_PROBE = "the chat template"  # the place named in errors about conversations of our own

_QUESTION: Message = {"role": "user", "content": "a"}
_REPLY: Message = {"role": "assistant", "content": "b"}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
_CALLS: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT: Message = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "c"}
_FOLLOWED = {False: [_QUESTION, _REPLY, _QUESTION], True: [_QUESTION, _CALLS, _RESULT]}  # by whether it has calls
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def check_offsets(tokenizer: Any) -> None:
    """Raises UserError if the tokenizer gives no character offsets, which labels need."""
    if not tokenizer.is_fast:
        raise UserError(
            f"base.model: {type(tokenizer).__name__} gives no character offsets, which labels need; use a model with "
            "a tokenizer.json"
        )


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's text, the spans of its assistant turns, and the parts of them to learn, by index of message."""

    text: str
    spans: dict[int, Span]
    parts: dict[int, list[Span]]


class ChatTemplate:
    """The chat template of one tokenizer, with the values of `settings` for variables of its own (enable_thinking).

    Raises UserError if the tokenizer has no chat template or gives no character offsets.
    """

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any] | None = None):
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
        self._renderer = TemplateRenderer(tokenizer, settings)
        self._skeletons: dict[tuple[str, ...], Skeleton] = {}
        self._prompts: dict[tuple[Any, ...], Header] = {}
        self._appended: dict[bool, str] = {}
        self._with_settings: dict[str, ChatTemplate] = {}

    def with_settings(self, settings: Mapping[str, Any] | None, origin: str) -> "ChatTemplate":
        """The same template with other settings, about which everything is found out anew.

        Raises UserError, naming `origin`, if turns then end in another way: generation would not stop there.
        """
        if not settings:
            return self
        key = json.dumps(settings, sort_keys=True)
        if key not in self._with_settings:
            if len(self._with_settings) == _MOST_SETTINGS:
                self._with_settings.clear()
            other = ChatTemplate(self._tokenizer, settings)
            if not {*other.learned_ends()} <= {*self.learned_ends()}:
                raise UserError(
                    f"{origin}: with the record's `{TEMPLATE_SETTINGS}` {key}, the chat template ends turns in another "
                    "way; remove the field, or write what it sets into data.chat_template"
                )
            self._with_settings[key] = other
        return self._with_settings[key]

    def render(self, messages: Sequence[Message], origin: str, tools: Tools = None) -> tuple[str, dict[int, Span]]:
        """The conversation's text, and the span of every assistant turn, in order, by index into `messages`.

        A span begins where the generation prompt ends and ends with the special token that ends the turn, so it is
        exactly what the model has to write, tool calls included. Where the template writes no such token, that is the
        one that begins the next turn; after the last answer, one is added that a generation stops at. `tools` are JSON
        schemas for the template.
        Raises UserError, naming `origin`, if the template refuses the conversation or leaves out a part of it other
        than the reasoning of answers before the last.
        """
        rendered = self.learned(messages, origin, tools)
        return rendered.text, rendered.spans

    def learned(self, messages: Sequence[Message], origin: str, tools: Tools = None) -> Rendered:
        """As `render`, and also gives what is to be learned of every assistant turn: all of it, or what the template
        marks with `{% generation %}`. Writes the first spelling of the tool calls that the template takes completely.
        """
        refused: list[UserError] = []
        incomplete: list[UserError] = []  # these say more: the template takes this spelling, but does not write it all
        for spelt in spellings(messages):
            try:
                text = self._renderer.text(spelt, origin, tools)
            except UserError as error:
                refused.append(error)
                continue
            try:
                return self._labelled(text, spelt, origin, tools)
            except UserError as error:
                incomplete.append(error)
        raise [*incomplete, *refused][0]

    def prompt(
        self, messages: Sequence[Message], origin: str, tools: Tools = None, answer: Message | None = None
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

    def learned_ends(self) -> list[str]:
        """The special tokens that end learned turns: the last answer, earlier ones, and calls. An empty string among
        them stands for turns that no special token ends."""
        return self._learned_ends

    @cached_property
    def _learned_ends(self) -> list[str]:
        ends: list[str] = []
        for messages in ([_QUESTION, _REPLY], *_FOLLOWED.values(), [_QUESTION, _CALLS]):
            try:
                found = self.learned(messages, _PROBE)
            except UserError:
                continue
            turns = [found.text[slice(*spans[-1])] if spans else "" for spans in found.parts.values()]
            ends += map(self._ends.last_token, turns)
        return [*dict.fromkeys(ends)]

    def added_ends(self) -> list[str]:
        """The tokens that are added after last answers which the template ends with none."""
        self.learned_ends()  # meets such answers
        return [*dict.fromkeys(filter(None, self._appended.values()))]

    def stop_tokens(self, reasons: bool = False) -> list[str]:
        """The special tokens that a generation has to stop at. With `reasons`, the model writes its reasoning, and
        tokens that also end a part of it, such as gpt-oss's analysis, are left out."""
        inside = self._ends.special.findall(self._reasoned_turn()) if reasons else []
        return [token for token in self.learned_ends() if token and token not in inside]

    def writes_dates(self) -> bool:
        """Whether the template writes the current date, as Llama-3.1's does."""
        return self._renderer.mentions("strftime_now")

    def unknown_settings(self, settings: Mapping[str, Any] | None) -> list[str]:
        """The names among these settings that no variable of the template has."""
        return [name for name in settings or () if not self._renderer.mentions(name)]

    def writes_tools(self) -> bool:
        """Whether a conversation's tools change its text."""
        try:
            texts = [self.learned([_QUESTION, _REPLY], _PROBE, tools).text for tools in ([_TOOL], None)]
        except UserError:
            return True
        return texts[0] != texts[1]

    def _reasoned_turn(self) -> str:
        """What the template writes for an answer with reasoning, before its end; empty if it refuses that."""
        try:
            text, spans = self.render([_QUESTION, {**_REPLY, "reasoning_content": "r"}], _PROBE)
        except UserError:
            return ""
        turn = text[slice(*spans[1])]
        return turn.removesuffix(self._ends.last_token(turn))

    @cached_property
    def _ends(self) -> TurnEnds:
        specials = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        return find_turn_ends(specials, self._renderer.text)

    def _labelled(self, text: str, messages: list[Message], origin: str, tools: Tools) -> Rendered:
        marks = self._renderer.marks(messages, origin, tools)
        try:
            spans, is_open = self._find_answers(text, messages, origin, tools)
        except UserError:
            answers = [index for index, message in enumerate(messages) if is_answer(message)]
            if marks is None or len(marks) != len(answers):
                raise
            spans, is_open = dict(zip(answers, marks, strict=True)), False
        check_reasoning(text, spans, messages, origin)
        check_arguments(text, spans, messages, origin)
        if marks is not None:
            parts = {index: [m for m in marks if m[0] < end and m[1] > start] for index, (start, end) in spans.items()}
            return Rendered(text, spans, parts)
        if is_open:
            last, (start, end) = len(messages) - 1, spans[len(messages) - 1]
            stop = self._stop_after(bool(messages[last].get("tool_calls")))
            text, spans[last] = text[:end] + stop + text[end:], (start, end + len(stop))
        return Rendered(text, spans, {index: [span] for index, span in spans.items()})

    def _find_answers(
        self, text: str, messages: list[Message], origin: str, tools: Tools
    ) -> tuple[dict[int, Span], bool]:
        """The spans of the assistant turns, and whether no special token ends the last one."""
        calls = _where(_has_calls, messages)
        if not tools and all(message.keys() == _PLAIN for message in messages):
            skeleton = self._skeleton_of_roles(tuple(message["role"] for message in messages), origin)
            spans = answer_spans(text, messages, skeleton)
        else:
            skeleton, spans = self._walk(text, messages, origin, tools, calls)
        if rewritten := _rewritten(messages, text):
            with_switch = self._walk(text, messages, origin, tools, calls | rewritten)
            skeleton, spans = with_switch if with_switch[1] is not None else (skeleton, spans)
        if spans is None:  # an answer can change the template's text around it, for example through its reasoning
            skeleton, spans = self._walk(text, messages, origin, tools, _where(is_answer, messages))
        if spans is None and (system := _where(_is_system, messages)):  # so can a system turn
            skeleton, spans = self._walk(text, messages, origin, tools, calls | system)
        if spans is None:
            write = partial(self._renderer.text, origin=origin)
            spans = spans_by_beginnings(text, messages, tools, write, self._ends)
        if spans is None:
            raise unreadable(origin)
        return spans, skeleton.is_open

    def _walk(
        self, text: str, messages: list[Message], origin: str, tools: Tools, verbatim: frozenset[int]
    ) -> tuple[Skeleton, dict[int, Span] | None]:
        """The skeleton of one conversation, whose rendered text is `text`, and the assistant turns along it."""
        tag = "turn"
        while f"<<{tag}:" in text:  # no text of the conversation may look like a marker
            tag += "_"
        write = partial(self._renderer.text, origin=origin)
        # After a verbatim system turn or question, prompts are of this conversation only.
        prompts = self._prompts if all(is_answer(messages[index]) for index in verbatim) else {}
        marked = MarkedConversation(write, prompts, messages, tools, verbatim, tag, self._ends.tokens)
        skeleton = read_skeleton(marked, self._ends, origin)
        return skeleton, answer_spans(text, messages, skeleton)

    def _skeleton_of_roles(self, roles: tuple[str, ...], origin: str) -> Skeleton:
        """The skeleton of every conversation with these roles whose messages have a role and content only."""
        if roles not in self._skeletons:
            messages = [{"role": role, "content": ""} for role in roles]
            marked = MarkedConversation(partial(self._renderer.text, origin=origin), self._prompts, messages)
            self._skeletons[roles] = read_skeleton(marked, self._ends, origin)
        return self._skeletons[roles]

    def _stop_after(self, has_calls: bool) -> str:
        """The token to add after a last answer that the template does not end: what the template writes next, if the
        base's generation_config stops there, else the tokenizer's end token."""
        if has_calls not in self._appended:
            try:
                text, spans = self.render(_FOLLOWED[has_calls], _PROBE)
                marker = self._ends.last_token(text[slice(*spans[1])])
            except UserError:
                marker = ""
            stops = marker in generation_stops(self._tokenizer)
            self._appended[has_calls] = marker if stops else self._tokenizer.eos_token or ""
        return self._appended[has_calls]


def _has_calls(message: Message) -> bool:
    return is_answer(message) and bool(message.get("tool_calls"))


def _is_system(message: Message) -> bool:
    return message["role"] == "system"


def _where(holds: Callable[[Message], bool], messages: Sequence[Message]) -> frozenset[int]:
    return frozenset(index for index, message in enumerate(messages) if holds(message))


def _rewritten(messages: Sequence[Message], text: str) -> frozenset[int]:
    """System turns and questions that the template does not write as they are: they may hold a switch for reasoning."""
    rewritten, position = set(), 0
    for index, message in enumerate(messages):
        if message["role"] in ("system", "user"):
            content = (message.get("content") or "").strip()
            found = text.find(content, position)
            if found >= 0:
                position = found + len(content)
            elif content not in text:
                rewritten.add(index)
    return frozenset(rewritten)
