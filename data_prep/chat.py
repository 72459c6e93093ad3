"""Renders conversations by the tokenizer's chat template and finds what the assistant says in the text.

The template is asked twice. Once, per sequence of roles, with a marker in place of every content: what stands
between the markers is the template's own text, the skeleton. Then with the conversation itself: walking along the
skeleton tells where each turn begins and ends, also where the template strips whitespace, adds a system prompt or
an empty reasoning block, or drops reasoning from earlier turns. No token id and no template is special-cased.

Tools, tool calls and reasoning in a field of its own are the template's text too, so a conversation with any of these
has its own skeleton. An assistant turn with tool calls stands in it verbatim, content and all, since templates write
the two around each other or drop one: it begins where the generation prompt ends, and ends with the end token of an
ordinary turn. Where the walk fails, it is tried again with all assistant turns verbatim.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import TemplateError

from data_prep.documents import Message, reasoning_of
from data_prep.user_error import UserError

_PLAIN = {"role", "content"}  # the fields of a message of which a skeleton needs to know the role only

_ANSWER = "<<answer>>"

Span = tuple[int, int]  # first character, and one past the last
_Header = tuple[int | None, str]  # the message whose marker is the last before a turn, and the text between the two


@dataclass(frozen=True, slots=True)
class _Turn:
    """One content in the skeleton, and the template's text from its end to the next turn (or the end)."""

    message: int  # index of the message whose content stands here
    lead: str  # what the model writes itself before the content: what the generation prompt leaves to it
    after: str
    closing: int  # characters of `after` that belong to the turn: whitespace and one special token
    is_verbatim: bool  # then `after` and its `closing` begin with the message, as the template writes it
    is_answer: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class _Skeleton:
    opening: str  # the template's text before the first turn (its lead not included)
    turns: list[_Turn]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one message stands in the text of a skeleton."""

    message: int
    start: int  # where the turn begins; an assistant's, where the model has to write
    content: Span  # of its marker; empty, at `start`, for a verbatim one


def check_offsets(tokenizer: Any) -> None:
    """Raises UserError where labels could not be found with this tokenizer."""
    if not tokenizer.is_fast:
        raise UserError(
            f"base.model: {type(tokenizer).__name__} gives no character offsets, by which labels are found; "
            "use a model with a tokenizer.json"
        )


class ChatTemplate:
    """The chat template of one tokenizer.

    Raises UserError where the tokenizer has no chat template or gives no character offsets.
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
        self._closing = re.compile(r"\s*(?:" + "|".join(map(re.escape, longest_first)) + ")") if specials else None
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}
        self._prompts: dict[tuple[Any, ...], _Header] = {}

    def render(
        self, messages: Sequence[Message], origin: str, tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, dict[int, Span]]:
        """The conversation's text, and by index into `messages` the span of every assistant turn, in order.

        A span begins where the generation prompt ends and ends with the end token, so it is exactly what the model
        has to write, tool calls included. `tools` are the JSON schemas that the template is given.
        Raises UserError, naming `origin`, where the template refuses the conversation or leaves out a part of it; it
        may leave out reasoning of answers before the last.
        """
        text = self._text(messages, origin, tools)
        roles = tuple([message["role"] for message in messages if message.keys() == _PLAIN])
        if not tools and len(roles) == len(messages):
            skeleton = self._plain_skeleton(roles, origin)
        else:
            skeleton = self._own_skeleton(messages, origin, tools, text, _has_calls)
        spans = _walk(text, messages, skeleton)
        if spans is None:  # answers can change what the template writes around them, as reasoning does
            spans = _walk(text, messages, self._own_skeleton(messages, origin, tools, text, _is_answer))
        if spans is None:
            raise _unreadable(origin)
        _check_reasoning(text, spans, messages, origin)
        return text, spans

    def prompt(
        self,
        messages: Sequence[Message],
        origin: str,
        tools: list[dict[str, Any]] | None = None,
        answer: Message | None = None,
    ) -> str:
        """What a model is asked with: what stands before the content of an answer to `messages` when it is trained.

        So it ends with what the template writes before every answer, such as Qwen3's empty reasoning block, unless
        `answer`, the one that is wanted, has reasoning: then with what stands before the model's turn.
        Raises UserError as `render` does.
        """
        if answer and reasoning_of(answer):
            text, spans = self.render([*messages, answer], origin, tools)
            return text[: spans[len(messages)][0]]
        text, spans = self.render([*messages, {"role": "assistant", "content": _ANSWER}], origin, tools)
        return text[: text.index(_ANSWER, spans[len(messages)][0])]

    def end_token(self) -> str:
        """The special token that ends an ordinary assistant turn; empty where none does: then a model does not learn
        to stop."""
        answer = self._plain_skeleton(("user", "assistant"), "the chat template").turns[-1]
        return answer.after[: answer.closing].strip()

    def writes_dates(self) -> bool:
        """Whether the template writes the day on which it is asked, as Llama-3.1's does."""
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
        except (TemplateError, TypeError) as error:  # TypeError: a template that joins text and, say, a dictionary
            roles = ", ".join(message["role"] for message in messages)
            cause = " ".join(str(error).split())
            raise UserError(
                f"{origin}: the tokenizer's chat template refuses turns of {roles}: {cause}; correct the conversation"
            ) from error

    def _plain_skeleton(self, roles: tuple[str, ...], origin: str) -> _Skeleton:
        if roles not in self._skeletons:
            messages = [{"role": role, "content": ""} for role in roles]
            draft = _Draft(partial(self._text, origin=origin), self._prompts, messages)
            self._skeletons[roles] = self._read(draft, origin)
        return self._skeletons[roles]

    def _own_skeleton(
        self,
        messages: Sequence[Message],
        origin: str,
        tools: list[dict[str, Any]] | None,
        text: str,
        is_verbatim: Callable[[Message], bool],
    ) -> _Skeleton:
        """The skeleton of one conversation, whose text is `text`."""
        tag = "turn"
        while f"<<{tag}:" in text:  # what looks like a marker in what is kept must not be taken for one
            tag += "_"
        verbatim = frozenset(index for index, message in enumerate(messages) if is_verbatim(message))
        write = partial(self._text, origin=origin)
        draft = _Draft(write, self._prompts, messages, tools, verbatim, tag, self.end_token())
        return self._read(draft, origin)

    def _read(self, draft: "_Draft", origin: str) -> _Skeleton:
        places = draft.places()
        _check_complete(places, draft.messages, origin)
        turns = []
        ends = [*(place.start for place in places[1:]), len(draft.text)]
        for place, end in zip(places, ends, strict=True):
            message, after = draft.messages[place.message], draft.text[place.content[1] : end]
            is_verbatim = place.message in draft.verbatim
            closing = self._end_of_verbatim(message, after, origin) if is_verbatim else self._end_of_answer(after)
            turn = _Turn(
                message=place.message,
                lead=draft.text[place.start : place.content[0]],
                after=draft.unmasked(after),
                closing=len(draft.unmasked(after[:closing])),
                is_verbatim=is_verbatim,
                is_answer=_is_answer(message),
                is_last=place is places[-1],
            )
            turns.append(turn)
        return _Skeleton(draft.unmasked(draft.text[: places[0].start]), turns)

    def _end_of_answer(self, after: str) -> int:
        closing = self._closing.match(after) if self._closing else None
        return closing.end() if closing else 0

    def _end_of_verbatim(self, message: Message, after: str, origin: str) -> int:
        """Past the end token of a verbatim turn, the only one in `after`: what only looks like one is masked."""
        token = self.end_token()
        if after.count(token) != 1:
            raise _unreadable(origin)
        end = after.index(token)
        if not all(call["function"]["name"] in after[:end] for call in message.get("tool_calls") or ()):
            raise UserError(
                f"{origin}: the tokenizer's chat template leaves out tool calls; use a model whose template writes "
                "them, or write them as content"
            )
        return end + len(token)


class _Draft:
    """A conversation as the template writes it, with markers for contents; verbatim turns keep theirs.

    In what is kept, masks stand for function names, to tell them from the same words elsewhere, and for end tokens,
    to tell them from the turn's. JSON escapes nothing in a mask or a marker.
    `write` takes messages, `tools` and `generation_prompt`, and returns the template's text. `prompts` keeps what
    generation prompts end with, by the roles and fields of the messages before.
    """

    def __init__(
        self,
        write: Callable[..., str],
        prompts: dict[tuple[Any, ...], _Header],
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        verbatim: frozenset[int] = frozenset(),
        tag: str = "turn",
        end_token: str = "",
    ):
        self.verbatim = verbatim
        self._write = write
        self._prompts = prompts
        self._tag = tag
        self._end_token = end_token
        self._masks = {f"<<{tag}:end>>": end_token}
        self._tools = self._without_end_tokens(tools)
        self.messages = [self._marked(index, message) for index, message in enumerate(messages)]
        self.text = write(self.messages, tools=self._tools)

    def unmasked(self, text: str) -> str:
        for mask, masked in self._masks.items():
            text = text.replace(mask, masked)
        return text

    def places(self) -> list[_Place]:
        """Every message that is found in the text, in the order of the text."""
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
        """A copy of a JSON value with end tokens masked in all of its texts."""
        if isinstance(value, str):
            return value.replace(self._end_token, f"<<{self._tag}:end>>") if self._end_token else value
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
        """Where the generation prompt for an assistant turn ends, if the text goes on from the last marker as it does.

        `ends` are those of the markers before. What stands before the last one may differ, as where Mistral's template
        writes tools: before the last question only.
        """
        if index == 0 or not _is_answer(self.messages[index]):
            return None
        shape = (bool(self._tools), *((message["role"], *message) for message in self.messages[:index]))
        end = self._end_of(self._prompts[shape], ends) if shape in self._prompts else None
        if end is None:  # not met yet, or with something in it that is this conversation's: a call's id
            text = self._write(self.messages[:index], tools=self._tools, generation_prompt=True)
            self._prompts[shape] = self._header_in(text)
            end = self._end_of(self._prompts[shape], ends)
        return end

    def _content_start(self, index: int, ends: dict[int, int]) -> int | None:
        """Where the content of a verbatim turn begins, for one that does not go on from the generation prompt."""
        messages = [*self.messages]
        messages[index] = {**messages[index], "content": self._marker(index)}
        before, found, _ = self._write(messages, tools=self._tools).partition(self._marker(index))
        return self._end_of(self._header_in(before), ends) if found else None

    def _header_in(self, text: str) -> _Header:
        markers = self._markers(text)
        if not markers:
            return None, text
        last, (_, end) = markers[-1]
        return last, text[end:]

    def _end_of(self, header: _Header, ends: dict[int, int]) -> int | None:
        """Where a header ends in the text, if it stands there."""
        last, tail = header
        begin = 0 if last is None else ends.get(last)
        return begin + len(tail) if begin is not None and self.text.startswith(tail, begin) else None


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def _has_calls(message: Message) -> bool:
    return _is_answer(message) and bool(message.get("tool_calls"))


def _walk(text: str, messages: Sequence[Message], skeleton: _Skeleton) -> dict[int, Span] | None:
    """The spans of the assistant turns, by index into `messages`; None where the text does not follow the skeleton."""
    if not text.startswith(skeleton.opening):
        return None
    spans, position = {}, len(skeleton.opening)
    for turn in skeleton.turns:
        end = _end_of_turn(text, position, "" if turn.is_verbatim else messages[turn.message]["content"], turn)
        if end is None:
            return None
        if turn.is_answer:
            spans[turn.message] = (position, end + turn.closing)
        position = end + len(turn.after)
    return spans


def _check_complete(places: list[_Place], messages: Sequence[Message], origin: str) -> None:
    """Raises UserError where a message is not in the skeleton, or an assistant turn not once and in order."""
    answers = [place.message for place in places if _is_answer(messages[place.message])]
    if answers != [i for i, message in enumerate(messages) if _is_answer(message)]:
        raise _unreadable(origin)
    present = {place.message for place in places}
    for index, message in enumerate(messages):
        if index not in present:
            raise UserError(
                f"{origin}: the tokenizer's chat template leaves out messages[{index}] ({message['role']}) of this "
                "conversation; remove the turn or correct the template"
            )


def _check_reasoning(text: str, spans: dict[int, Span], messages: Sequence[Message], origin: str) -> None:
    """Raises UserError where the last answer's reasoning is not in its span."""
    for index in [*spans][-1:]:
        if not all(part in text[slice(*spans[index])] for part in reasoning_of(messages[index])):
            raise UserError(
                f"{origin}: the tokenizer's chat template leaves out the reasoning of messages[{index}], the last "
                "answer; name one that writes it under data.chat_template, or remove the reasoning from the record"
            )


def _end_of_turn(text: str, start: int, content: str, turn: _Turn) -> int | None:
    """Where a turn that begins at `start` ends: after its content, as given or stripped, or else at what follows."""
    if text.startswith(turn.lead, start):
        begin = start + len(turn.lead)
        for written in (content, content.strip()):
            end = begin + len(written)
            if text.startswith(written, begin) and _is_followed(text, end, turn):
                return end
    # The template changed the content itself, as Qwen3's does with reasoning in earlier turns. What follows tells
    # the end, unless the content looks as if it ended before.
    if turn.is_verbatim or turn.after in content:
        return None
    end = len(text) - len(turn.after) if turn.is_last else text.find(turn.after, start)
    return end if end >= start and _is_followed(text, end, turn) else None


def _is_followed(text: str, end: int, turn: _Turn) -> bool:
    return text.startswith(turn.after, end) and (not turn.is_last or end + len(turn.after) == len(text))


def _unreadable(origin: str) -> UserError:
    return UserError(
        f"{origin}: the tokenizer's chat template leaves out, repeats or rewrites turns of this conversation, so its "
        "assistant turns cannot be found; correct the conversation or the template"
    )
