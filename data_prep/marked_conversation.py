"""A conversation rendered with markers in place of contents, which shows where its turns are."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_prep.documents import Message
from data_prep.template_renderer import Span, Tools
from data_prep.user_error import UserError

Header = tuple[int | None, str]  # the last message whose marker is before a turn, and the text from there to the turn
# A header for every turn after a message of the same kind: how far back the message of the marker is, and the text with
# placeholders for that message's fields, such as a call's id.
_HeaderOfKind = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one message stands in the text of a skeleton."""

    message: int
    start: int  # where the turn begins; for an assistant turn, where the model starts writing
    content: Span  # span of its marker; empty, at `start`, for a verbatim turn


class MarkedConversation:
    """A conversation rendered with markers for contents; verbatim messages keep their content.

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
        tools: Tools = None,
        verbatim: frozenset[int] = frozenset(),
        tag: str = "turn",
        end_tokens: Iterable[str] = (),
    ):
        self.verbatim = verbatim
        self._write = write
        self._prompts = prompts
        self._tag = tag
        self._end_masks = {token: f"<<{tag}:end {number}>>" for number, token in enumerate(sorted(end_tokens))}
        self._masks = {mask: token for token, mask in self._end_masks.items()}
        self._tools = self._without_end_tokens(tools)
        self.messages = [self._marked(index, message) for index, message in enumerate(messages)]
        self.text = write(self.messages, tools=self._tools)
        self._ends: dict[int, int] = {}  # of the markers, by message
        self._of_kind: dict[tuple[Any, ...], list[_HeaderOfKind]] = {}
        self._settled: set[tuple[Any, ...]] = set()  # kinds of which a further prompt would show nothing new
        self._refused: set[tuple[Any, ...]] = set()  # kinds after which the template has refused a prompt

    def unmasked(self, text: str) -> str:
        """The text with the original function names and end tokens."""
        return re.sub(f"<<{self._tag}:(?:end|call) [\\d.]+>>", lambda found: self._masks[found[0]], text)

    def moved(self, text: str, index: int, other: int) -> str:
        """The text with the names of one message's calls in place of another's."""
        return text.replace(f"<<{self._tag}:call {index}.", f"<<{self._tag}:call {other}.")

    def places(self) -> list[Place]:
        """Every message found in the text, in the order of the text."""
        places = []
        for index, content in self._markers(self.text):
            start = self._answer_start(index) if self._is_answer(index) else None
            if start is None or start > content[0]:
                start = content[0]
            places.append(Place(index, start, content))
            self._ends[index] = content[1]
        starts = {index: self._answer_start(index) for index in sorted(self.verbatim) if self._is_answer(index)}
        starts |= self._content_starts([index for index, start in starts.items() if start is None])
        places += [Place(index, start, (start, start)) for index, start in starts.items() if start is not None]
        return sorted(places, key=lambda place: place.start)

    def end_of_names(self, index: int, text: str) -> int | None:
        """One past the first place in a text where every call of a message has been named; None if one is not."""
        masks = [call["function"]["name"] for call in self.messages[index].get("tool_calls") or ()]
        ends = [text.find(mask) + len(mask) for mask in masks if mask in text]
        return max(ends, default=0) if len(ends) == len(masks) else None

    def own_text(self, place: Place) -> str | None:
        """What the template writes from `place` on if the conversation ends with its message; None if it refuses."""
        try:
            text = self._write(self.messages[: place.message + 1], tools=self._tools)
        except UserError:
            return None
        before = [index for index in self._ends if index < place.message]
        if not before:
            return text[place.start :]
        last = max(before)
        _, found, own = text.partition(self._marker(last))
        return own[place.start - self._ends[last] :] if found else None

    def _is_answer(self, index: int) -> bool:
        return is_answer(self.messages[index])

    def _marked(self, index: int, message: Message) -> Message:
        if index not in self.verbatim:
            return {**message, "content": self._marker(index)}
        if not is_answer(message):
            return message
        calls = [self._masked(call, f"{index}.{number}") for number, call in enumerate(message.get("tool_calls") or ())]
        return self._without_end_tokens({**message, "tool_calls": calls} if calls else message)

    def _masked(self, call: dict[str, Any], number: str) -> dict[str, Any]:
        mask = f"<<{self._tag}:call {number}>>"
        self._masks[mask] = call["function"]["name"]
        return {**call, "function": {**call["function"], "name": mask}}

    def _without_end_tokens(self, value: Any) -> Any:
        """A copy of a JSON value with end tokens masked in all strings."""
        if isinstance(value, str):
            for token, mask in self._end_masks.items():
                value = value.replace(token, mask)
            return value
        if isinstance(value, list):
            return [self._without_end_tokens(part) for part in value]
        if isinstance(value, dict):
            return {self._without_end_tokens(key): self._without_end_tokens(part) for key, part in value.items()}
        return value

    def _marker(self, index: int) -> str:
        return f"<<{self._tag}:{index}>>"

    def _markers(self, text: str) -> list[tuple[int, Span]]:
        return [(int(marker[1]), marker.span()) for marker in re.finditer(f"<<{self._tag}:(\\d+)>>", text)]

    def _answer_start(self, index: int) -> int | None:
        """Where the generation prompt of an assistant turn ends, if the text after the last marker continues with it.

        Text before the last marker may differ: Mistral's template, for example, writes tools before the last question
        only. A prompt is rendered for the first turn of each kind, that is after a message with the same role and
        fields, and again only where the text does not continue with it.
        """
        if index == 0:
            return None
        kind = _kind(self.messages[index - 1])
        for known in self._of_kind.get(kind, ()):
            if (end := self._end_of(self._header_at(index, known))) is not None:
                return end
        if kind in self._settled:
            return None
        if kind in self._refused and (start := self._after_prompt_of_others(index)) is not None:
            return start
        try:
            header = self._prompt_header(index)
        except UserError:  # the template refuses the turns before this one alone
            self._refused.add(kind)
            return self._after_prompt_of_others(index)
        of_kind = self._header_of_kind(index, header)
        if of_kind in self._of_kind.setdefault(kind, []):
            self._settled.add(kind)
        elif of_kind is not None:
            self._of_kind[kind].append(of_kind)
        return self._end_of(header)

    def _prompt_header(self, index: int) -> Header:
        """The header that the generation prompt before a message ends with. Raises UserError if that is refused."""
        shape = (bool(self._tools), *map(_kind, self.messages[:index]))
        header = self._prompts.get(shape)
        if header is None or self._end_of(header) is None:  # or it holds text of another conversation, such as an id
            header = self._prompts[shape] = self._header_in(self._prompt(index))
        return header

    def _prompt(self, index: int) -> str:
        return self._write(self.messages[:index], tools=self._tools, generation_prompt=True)

    def _header_of_kind(self, index: int, header: Header) -> _HeaderOfKind | None:
        last, text = header
        if last is None:
            return None
        for name, value in _fields(self.messages[last]):
            text = text.replace(value, f"<<{self._tag}:field {name}>>")
        return index - last, text

    def _header_at(self, index: int, header: _HeaderOfKind) -> Header:
        back, text = header
        last = index - back
        for name, value in _fields(self.messages[last]) if last >= 0 else ():
            text = text.replace(f"<<{self._tag}:field {name}>>", value)
        return last, text

    def _after_prompt_of_others(self, index: int) -> int | None:
        """Where an assistant turn begins whose prompt the template refuses: after the copy of what it writes for other
        prompts between the markers before and after the turn, if there is one."""
        begin = max((end for message, end in self._ends.items() if message < index), default=0)
        end = min((end for message, end in self._ends.items() if message > index), default=len(self.text))
        found = self.text.find(self._generation_prompt, begin, end) if self._generation_prompt else -1
        return found + len(self._generation_prompt) if found >= 0 else None

    @cached_property
    def _generation_prompt(self) -> str:
        """What the template adds for a generation after the conversation; empty if it refuses that or adds nothing."""
        for end in (len(self.messages), *self._answers_after_questions()):
            try:
                without, prompt = self._write(self.messages[:end], tools=self._tools), self._prompt(end)
            except UserError:
                continue
            if prompt.startswith(without):  # not where the end of the last answer depends on what follows
                return prompt.removeprefix(without)
        return ""

    def _answers_after_questions(self) -> Iterator[int]:
        roles = [message["role"] for message in self.messages]
        return (index for index in range(1, len(roles)) if roles[index - 1 : index + 1] == ["user", "assistant"])

    def _content_starts(self, indices: Sequence[int]) -> dict[int, int | None]:
        """Where the contents of verbatim turns begin, which do not continue from their generation prompts."""
        if not indices:
            return {}
        starts = self._content_starts_in(self._with_markers_at(indices), frozenset(indices))
        alone = [index for index, start in starts.items() if start is None] if len(indices) > 1 else []
        for index in alone:
            starts |= self._content_starts_in(self._with_markers_at([index]), [index])
        return starts

    def _with_markers_at(self, indices: Sequence[int]) -> str:
        messages = [*self.messages]
        for index in indices:
            messages[index] = {**messages[index], "content": self._marker(index)}
        return self._write(messages, tools=self._tools)

    def _content_starts_in(self, text: str, indices: Collection[int]) -> dict[int, int | None]:
        """The same by a text with markers for these contents; None where the text is another without them."""
        starts: dict[int, int | None] = {}
        last, end = None, 0  # the marker before
        for index, (begin, stop) in self._markers(text):
            if index in indices:
                starts.setdefault(index, self._end_of((last, text[end:begin])))
            last, end = index, stop
        return {index: starts.get(index) for index in indices}

    def _header_in(self, text: str) -> Header:
        markers = self._markers(text)
        if not markers:
            return None, text
        last, (_, end) = markers[-1]
        return last, text[end:]

    def _end_of(self, header: Header) -> int | None:
        """Where a header ends in the text, if it is there."""
        last, tail = header
        begin = 0 if last is None else self._ends.get(last)
        return begin + len(tail) if begin is not None and self.text.startswith(tail, begin) else None


def is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def _kind(message: Message) -> tuple[str, ...]:
    return (message["role"], *message)


def _fields(message: Message) -> list[tuple[str, str]]:
    """The texts of a message, without its role and content, that can stand in a header."""
    others = ((name, value) for name, value in message.items() if name not in ("role", "content"))
    return [(name, value) for name, value in others if value and isinstance(value, str)]
