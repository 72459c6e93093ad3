"""The text that a chat template writes around the messages of a conversation.

A skeleton comes from rendering the conversation with a marker in place of each content: what stands between the
markers is the template's own text. Tools, tool calls and reasoning in a separate field also count as template text, so
a conversation with any of them has its own skeleton.

An assistant turn with tool calls keeps its content there ("verbatim"), since templates write calls and content around
each other or drop one. It begins where the generation prompt ends; `turn_ends` says where it ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.marked_conversation import MarkedConversation, Place, is_answer
from data_prep.turn_ends import TurnEnds
from data_prep.user_error import UserError


@dataclass(frozen=True, slots=True)
class Turn:
    """One content in the skeleton, and the template's text from its end to the next turn (or to the end)."""

    message: int  # index of the message whose content stands here
    lead: str  # text before the content that the generation prompt leaves to the model
    after: str
    closing: int  # characters of `after` that belong to the turn: through the special token that ends it
    is_verbatim: bool  # whether `after` and its `closing` begin with the message itself, as the template writes it
    is_answer: bool
    is_last: bool
    is_open: bool  # whether it is an answer at the end of the text that no special token ends


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The template's text of one sequence of messages, without their contents."""

    opening: str  # text before the first turn, without that turn's lead
    turns: list[Turn]

    @property
    def is_open(self) -> bool:
        """Whether the text ends with an answer that no special token ends."""
        return self.turns[-1].is_open


def read_skeleton(marked: MarkedConversation, ends: TurnEnds, origin: str) -> Skeleton:
    """Reads the skeleton from a marked conversation.

    Raises UserError, naming `origin`, if the template leaves out a message, or if assistant turns are not there once
    each and in order.
    """
    places = marked.places()
    _check_complete(places, marked, origin)
    verbatim_ends = _VerbatimEnds(marked, ends, origin)
    turns = []
    stops = [*(place.start for place in places[1:]), len(marked.text)]
    for place, stop in zip(places, stops, strict=True):
        message, after = marked.messages[place.message], marked.text[place.content[1] : stop]
        is_verbatim, is_last = place.message in marked.verbatim, place is places[-1]
        closing = verbatim_ends.find(place, after, is_last) if is_verbatim else ends.after_content(after)
        ended = ends.last_token(after[:closing]) if ends.tokens or not is_verbatim else ""
        turn = Turn(
            message=place.message,
            lead=marked.text[place.start : place.content[0]],
            after=marked.unmasked(after),
            closing=len(marked.unmasked(after[:closing])),
            is_verbatim=is_verbatim,
            is_answer=is_answer(message),
            is_last=is_last,
            is_open=is_last and is_answer(message) and not ended,
        )
        turns.append(turn)
    return Skeleton(marked.unmasked(marked.text[: places[0].start]), turns)


def unreadable(origin: str) -> UserError:
    """The error for a conversation whose assistant turns cannot be found in the template's text."""
    return UserError(
        f"{origin}: the tokenizer's chat template leaves out, repeats or rewrites turns of this conversation, so its "
        "assistant turns cannot be found; correct the conversation or the template"
    )


def _check_complete(places: Sequence[Place], marked: MarkedConversation, origin: str) -> None:
    messages = marked.messages
    answers = [place.message for place in places if is_answer(messages[place.message])]
    if answers != [i for i, message in enumerate(messages) if is_answer(message)]:
        raise unreadable(origin)
    present = {place.message for place in places} | marked.verbatim
    for index, message in enumerate(messages):
        if index not in present:
            raise UserError(
                f"{origin}: the tokenizer's chat template leaves out messages[{index}] ({message['role']}) of this "
                "conversation; remove the turn or correct the template"
            )


class _VerbatimEnds:
    """Where the verbatim turns of one conversation end."""

    def __init__(self, marked: MarkedConversation, ends: TurnEnds, origin: str):
        self._marked = marked
        self._ends = ends
        self._origin = origin
        # By kind of turn, where ordinary answers end in another way: the token, and the text from it to the next turn
        # as it stands after one message.
        self._unusual: dict[tuple[Any, ...], tuple[str, str, int]] = {}

    def find(self, place: Place, after: str, is_last: bool) -> int:
        """Where the turn that begins `after` ends. Raises UserError if a call is missing or no end is found."""
        begin = self._marked.end_of_names(place.message, after)
        if begin is None:
            raise UserError(
                f"{self._origin}: the tokenizer's chat template leaves out tool calls; use a model whose template "
                "writes them, or write them as content"
            )
        usual = self._ends.usual(after[begin:])  # the template's, since those in the message are masked
        if usual:
            end = begin + usual[0] if len(usual) == 1 and not self._ends.usual(after[:begin]) else None
        else:
            end = self._unusual_end(place, after, begin, is_last)
        if end is None:
            raise unreadable(self._origin)
        return end

    def _unusual_end(self, place: Place, after: str, begin: int, is_last: bool) -> int | None:
        """The end of a turn without a token that ends ordinary answers: looked for once per kind of turn."""
        messages = self._marked.messages
        following = next((message["role"] for message in messages[place.message + 1 : place.message + 2]), None)
        kind = (bool(messages[place.message].get("tool_calls")), following)
        token, rest, known = self._unusual.get(kind, ("", "", 0))
        rest = self._marked.moved(rest, known, place.message)
        if token and after.count(token, begin) == 1:
            return after.index(token, begin) + len(token)
        if rest and after.endswith(rest, begin) and not after[: -len(rest)].endswith((" ", "\n")):
            return len(after) - len(rest)
        own = after if is_last else self._marked.own_text(place)
        if own is None:
            raise UserError(
                f"{self._origin}: where the turn of messages[{place.message}] ends cannot be seen: the tokenizer's "
                "chat template refuses the conversation up to there; mark what is learned with {% generation %} in a "
                "copy of the template under data.chat_template"
            )
        # From the calls on: before them, some templates write the reasoning only where no other answer follows.
        calls = self._marked.end_of_names(place.message, own)
        length = None if calls is None else self._ends.within(own[calls:], after[begin:])
        if length is None:
            return None
        end = begin + length
        self._unusual[kind] = self._ends.last_token(after[:end]), after[end:], place.message
        return end
