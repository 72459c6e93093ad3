"""The text that a chat template writes around the messages of a conversation.

A skeleton comes from rendering the conversation with a marker in place of each content: what stands between the
markers is the template's own text. Tools, tool calls and reasoning in a separate field also count as template text, so
a conversation with any of them has its own skeleton.

An assistant turn with tool calls keeps its content there ("verbatim"), since templates write calls and content around
each other or drop one. It begins where the generation prompt ends and closes with the end token of ordinary turns.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.documents import Message
from data_prep.user_error import UserError

Span = tuple[int, int]  # first character, and one past the last
Header = tuple[int | None, str]  # the last message whose marker is before a turn, and the text from there to the turn


@dataclass(frozen=True, slots=True)
class Turn:
    """One content in the skeleton, and the template's text from its end to the next turn (or to the end)."""

    message: int  # index of the message whose content stands here
    lead: str  # text before the content that the generation prompt leaves to the model
    after: str
    closing: int  # characters of `after` that belong to the turn: whitespace and one special token
    is_verbatim: bool  # whether `after` and its `closing` begin with the message itself, as the template writes it
    is_answer: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The template's text of one sequence of messages, without their contents."""

    opening: str  # text before the first turn, without that turn's lead
    turns: list[Turn]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one message stands in the text of a skeleton."""

    message: int
    start: int  # where the turn begins; for an assistant turn, where the model starts writing
    content: Span  # span of its marker; empty, at `start`, for a verbatim turn


class MarkedConversation:
    """A conversation rendered with markers for contents; verbatim turns keep their content.

    In verbatim turns, masks replace function names and end tokens, to tell them from equal text elsewhere and from the
    turn's own end token. JSON escapes no character of a mask or a marker.
    `write` takes messages, `tools` and `generation_prompt` and returns the template's text. `prompts` caches the
    headers that generation prompts end with, by the roles and fields of the messages before them.
    """

    def __init__(
        self,
        write: Callable[..., str],
        prompts: dict[tuple[Any, ...], Header],
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        verbatim: frozenset[int] = frozenset(),
        tag: str = "turn",
        end_token: str = "",
    ):
        self.verbatim = verbatim
        self.end_token = end_token
        self._write = write
        self._prompts = prompts
        self._tag = tag
        self._masks = {f"<<{tag}:end>>": end_token}
        self._tools = self._without_end_tokens(tools)
        self.messages = [self._marked(index, message) for index, message in enumerate(messages)]
        self.text = write(self.messages, tools=self._tools)

    def unmasked(self, text: str) -> str:
        """The text with the original function names and end tokens."""
        for mask, masked in self._masks.items():
            text = text.replace(mask, masked)
        return text

    def places(self) -> list[_Place]:
        """Every message found in the text, in the order of the text."""
        ends: dict[int, int] = {}
        places = []
        for index, content in self._markers(self.text):
            start = self._prompt_end(index, ends)
            places.append(_Place(index, content[0] if start is None else start, content))
            ends[index] = content[1]
        for index in self.verbatim:
            start = self._prompt_end(index, ends)
            if start is None:
                start = self._content_start(index, ends)
            if start is not None:
                places.append(_Place(index, start, (start, start)))
        return sorted(places, key=lambda place: place.start)

    def _marked(self, index: int, message: Message) -> Message:
        if index not in self.verbatim:
            return {**message, "content": self._marker(index)}
        calls = [self._masked(call, f"{index}.{number}") for number, call in enumerate(message.get("tool_calls") or ())]
        return self._without_end_tokens({**message, "tool_calls": calls} if calls else message)

    def _masked(self, call: dict[str, Any], number: str) -> dict[str, Any]:
        mask = f"<<{self._tag}:call {number}>>"
        self._masks[mask] = call["function"]["name"]
        return {**call, "function": {**call["function"], "name": mask}}

    def _without_end_tokens(self, value: Any) -> Any:
        """A copy of a JSON value with end tokens masked in all strings."""
        if isinstance(value, str):
            return value.replace(self.end_token, f"<<{self._tag}:end>>") if self.end_token else value
        if isinstance(value, list):
            return [self._without_end_tokens(part) for part in value]
        if isinstance(value, dict):
            return {self._without_end_tokens(key): self._without_end_tokens(part) for key, part in value.items()}
        return value

    def _marker(self, index: int) -> str:
        return f"<<{self._tag}:{index}>>"

    def _markers(self, text: str) -> list[tuple[int, Span]]:
        return [(int(marker[1]), marker.span()) for marker in re.finditer(f"<<{self._tag}:(\\d+)>>", text)]

    def _prompt_end(self, index: int, ends: dict[int, int]) -> int | None:
        """Where the generation prompt of an assistant turn ends, if the text after the last marker continues with it.

        `ends` gives the ends of earlier markers. Text before the last marker may differ: Mistral's template, for
        example, writes tools before the last question only.
        """
        if index == 0 or not is_answer(self.messages[index]):
            return None
        shape = (bool(self._tools), *((message["role"], *message) for message in self.messages[:index]))
        end = self._end_of(self._prompts[shape], ends) if shape in self._prompts else None
        if end is None:  # not cached, or the cached one holds text of another conversation, such as a call's id
            text = self._write(self.messages[:index], tools=self._tools, generation_prompt=True)
            self._prompts[shape] = self._header_in(text)
            end = self._end_of(self._prompts[shape], ends)
        return end

    def _content_start(self, index: int, ends: dict[int, int]) -> int | None:
        """Where the content of a verbatim turn begins, if the turn does not continue from the generation prompt."""
        messages = [*self.messages]
        messages[index] = {**messages[index], "content": self._marker(index)}
        before, found, _ = self._write(messages, tools=self._tools).partition(self._marker(index))
        return self._end_of(self._header_in(before), ends) if found else None

    def _header_in(self, text: str) -> Header:
        markers = self._markers(text)
        if not markers:
            return None, text
        last, (_, end) = markers[-1]
        return last, text[end:]

    def _end_of(self, header: Header, ends: dict[int, int]) -> int | None:
        """Where a header ends in the text, if it is there."""
        last, tail = header
        begin = 0 if last is None else ends.get(last)
        return begin + len(tail) if begin is not None and self.text.startswith(tail, begin) else None


def read_skeleton(marked: MarkedConversation, end_pattern: re.Pattern[str] | None, origin: str) -> Skeleton:
    """Reads the skeleton from a marked conversation.

    end_pattern: whitespace and one special token; None if the tokenizer has no special tokens. Raises UserError, naming
    `origin`, if the template leaves out a message, or if assistant turns are not there once each and in order.
    """
    places = marked.places()
    _check_complete(places, marked.messages, origin)
    turns = []
    ends = [*(place.start for place in places[1:]), len(marked.text)]
    for place, end in zip(places, ends, strict=True):
        message, after = marked.messages[place.message], marked.text[place.content[1] : end]
        is_verbatim = place.message in marked.verbatim
        if is_verbatim:
            closing = _end_of_verbatim(message, after, marked.end_token, origin)
        else:
            found = end_pattern.match(after) if end_pattern else None
            closing = found.end() if found else 0
        turn = Turn(
            message=place.message,
            lead=marked.text[place.start : place.content[0]],
            after=marked.unmasked(after),
            closing=len(marked.unmasked(after[:closing])),
            is_verbatim=is_verbatim,
            is_answer=is_answer(message),
            is_last=place is places[-1],
        )
        turns.append(turn)
    return Skeleton(marked.unmasked(marked.text[: places[0].start]), turns)


def is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def unreadable(origin: str) -> UserError:
    """The error for a conversation whose assistant turns cannot be found in the template's text."""
    return UserError(
        f"{origin}: the tokenizer's chat template leaves out, repeats or rewrites turns of this conversation, so its "
        "assistant turns cannot be found; correct the conversation or the template"
    )


def _check_complete(places: list[_Place], messages: Sequence[Message], origin: str) -> None:
    answers = [place.message for place in places if is_answer(messages[place.message])]
    if answers != [i for i, message in enumerate(messages) if is_answer(message)]:
        raise unreadable(origin)
    present = {place.message for place in places}
    for index, message in enumerate(messages):
        if index not in present:
            raise UserError(
                f"{origin}: the tokenizer's chat template leaves out messages[{index}] ({message['role']}) of this "
                "conversation; remove the turn or correct the template"
            )


def _end_of_verbatim(message: Message, after: str, end_token: str, origin: str) -> int:
    """One past the end token of a verbatim turn, the only one in `after`, since those in the content are masked."""
    if after.count(end_token) != 1:
        raise unreadable(origin)
    end = after.index(end_token)
    if not all(call["function"]["name"] in after[:end] for call in message.get("tool_calls") or ()):
        raise UserError(
            f"{origin}: the tokenizer's chat template leaves out tool calls; use a model whose template writes "
            "them, or write them as content"
        )
    return end + len(end_token)
