"""Renders conversations by the tokenizer's chat template and finds what the assistant says in the text.

The template is asked twice. Once, per sequence of roles, with a marker in place of every content: what stands
between the markers is the template's own text, the skeleton. Then with the conversation itself: walking along the
skeleton tells where each turn begins and ends, also where the template strips whitespace, adds a system prompt or
an empty reasoning block, or drops reasoning from earlier turns. No token id and no template is special-cased.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from data_prep.documents import Message
from data_prep.errors import UserError

_MARKER = re.compile(r"<<turn:(\d+)>>")

Span = tuple[int, int]  # first character, and one past the last


@dataclass(frozen=True)
class _Turn:
    """One content in the skeleton, and the template's text from its end to the next content (or the end)."""

    message: int  # index of the message whose content stands here
    lead: str  # what the model writes itself before the content: what the generation prompt leaves to it
    after: str
    closing: int  # characters of `after` that end the turn: whitespace and one special token


@dataclass(frozen=True)
class _Skeleton:
    opening: str  # the template's text before the first turn (its lead not included)
    turns: list[_Turn]


def check_tokenizer(tokenizer: Any) -> None:
    """Raises UserError where labels could not be found with this tokenizer."""
    if not tokenizer.is_fast:
        raise UserError(
            f"base.model: {type(tokenizer).__name__} gives no character offsets, by which labels are found; "
            "use a model with a tokenizer.json"
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"base.model: the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; "
            "use an instruction-tuned model or save a chat_template.jinja beside its tokenizer"
        )


class ChatTemplate:
    """The chat template of one tokenizer.

    Raises UserError where the tokenizer has no chat template or gives no character offsets.
    """

    def __init__(self, tokenizer: Any):
        check_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        specials = {token.content for token in tokenizer.added_tokens_decoder.values()}
        longest_first = sorted(specials, key=lambda token: (-len(token), token))
        self._closing = re.compile(r"\s*(?:" + "|".join(map(re.escape, longest_first)) + ")") if specials else None
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}

    def render(self, messages: Sequence[Message], origin: str) -> tuple[str, list[Span]]:
        """The conversation's text, and the span of every assistant turn with its end token, in order.

        A span begins where the generation prompt ends, so it is exactly what the model has to write.
        Raises UserError, naming `origin`, where the template refuses the conversation or leaves out a turn of it.
        """
        skeleton = self._skeleton(messages, origin)
        text = self._text(messages, origin)
        spans, position = [], len(skeleton.opening)
        if not text.startswith(skeleton.opening):
            raise _unreadable(origin)
        for turn in skeleton.turns:
            is_last = turn is skeleton.turns[-1]
            end = _end_of_turn(text, position, messages[turn.message]["content"], turn, is_last)
            if end is None:
                raise _unreadable(origin)
            if messages[turn.message]["role"] == "assistant":
                spans.append((position, end + turn.closing))
            position = end + len(turn.after)
        return text, spans

    def closes_turns(self) -> bool:
        """Whether a special token ends the last assistant turn; without one a model does not learn to stop."""
        messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        return self._skeleton(messages, "the chat template").turns[-1].closing > 0

    def _text(self, messages: Sequence[Message], origin: str, generation_prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            cause = " ".join(str(error).split())
            raise UserError(
                f"{origin}: the tokenizer's chat template refuses turns of {roles}: {cause}; correct the conversation"
            ) from error

    def _skeleton(self, messages: Sequence[Message], origin: str) -> _Skeleton:
        roles = tuple(message["role"] for message in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._build_skeleton(roles, origin)
        return self._skeletons[roles]

    def _build_skeleton(self, roles: tuple[str, ...], origin: str) -> _Skeleton:
        messages = [{"role": role, "content": f"<<turn:{index}>>"} for index, role in enumerate(roles)]
        text = self._text(messages, origin)
        markers = list(_MARKER.finditer(text))
        starts, order = [], [int(marker[1]) for marker in markers]
        for marker, index in zip(markers, order, strict=True):
            start = marker.start()
            if roles[index] == "assistant":
                start = self._prompt_end(messages[:index], text, start, origin)
            starts.append(start)
        if [i for i in order if roles[i] == "assistant"] != [i for i, role in enumerate(roles) if role == "assistant"]:
            raise _unreadable(origin)  # a turn left out or written twice: labels could not be exact

        ends = [*starts[1:], len(text)]
        turns = []
        for marker, index, start, end in zip(markers, order, starts, ends, strict=True):
            after = text[marker.end() : end]
            closing = self._closing.match(after) if self._closing else None
            turns.append(_Turn(index, text[start : marker.start()], after, closing.end() if closing else 0))
        return _Skeleton(text[: starts[0]], turns)

    def _prompt_end(self, before: list[Message], text: str, marker: int, origin: str) -> int:
        """Where the generation prompt for the turn at `marker` ends, if the text goes on from it; else `marker`."""
        if not before:
            return marker
        prompt = self._text(before, origin, generation_prompt=True)
        return len(prompt) if len(prompt) <= marker and text.startswith(prompt) else marker


def _end_of_turn(text: str, start: int, content: str, turn: _Turn, is_last: bool) -> int | None:
    """Where a turn that begins at `start` ends: after its content, as given or stripped, or else at what follows."""

    def followed(end: int) -> bool:
        return text.startswith(turn.after, end) and (not is_last or end + len(turn.after) == len(text))

    for lead in dict.fromkeys((turn.lead, "")):
        for variant in (content, content.strip(), content.rstrip(), content.lstrip()):
            end = start + len(lead) + len(variant)
            if text.startswith(lead + variant, start) and followed(end):
                return end
    # The template changed the content itself, as Qwen3's does with reasoning in earlier turns.
    end = len(text) - len(turn.after) if is_last else text.find(turn.after, start)
    return end if turn.after and end >= start and followed(end) else None


def _unreadable(origin: str) -> UserError:
    return UserError(
        f"{origin}: the tokenizer's chat template leaves out, repeats or rewrites turns of this conversation, so its "
        "assistant turns cannot be found; correct the conversation or the template"
    )
