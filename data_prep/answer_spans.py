"""Finds the assistant turns in the rendered text of a conversation: along its skeleton, or by rendering beginnings."""

from collections.abc import Callable, Sequence

from data_prep.chat_skeleton import Skeleton, Turn
from data_prep.documents import Message
from data_prep.marked_conversation import is_answer
from data_prep.template_renderer import Span, Tools
from data_prep.turn_ends import TurnEnds


def answer_spans(text: str, messages: Sequence[Message], skeleton: Skeleton) -> dict[int, Span] | None:
    """Spans of the assistant turns, by index into `messages`; None if the text does not follow the skeleton."""
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


def spans_by_beginnings(
    text: str, messages: Sequence[Message], tools: Tools, write: Callable[..., str], ends: TurnEnds
) -> dict[int, Span] | None:
    """The same for a template whose text depends on contents, such as a switch for reasoning in the system prompt.

    Renders the conversation up to every answer, so its time grows with the square of the turns. None if the text does
    not begin with each of these, or a turn's end is not found. `write` is as in MarkedConversation.
    """
    spans = {}
    for index, message in enumerate(messages):
        if not is_answer(message):
            continue
        prompt = write(messages[:index], tools=tools, generation_prompt=True) if index else ""
        through = write(messages[: index + 1], tools=tools)
        if not prompt or not text.startswith(prompt) or not through.startswith(prompt):
            return None
        end = ends.within(through[len(prompt) :], text[len(prompt) :])
        if end is None:
            return None
        spans[index] = (len(prompt), len(prompt) + end)
    return spans


def _end_of_turn(text: str, start: int, content: str, turn: Turn) -> int | None:
    """Where the turn that begins at `start` ends: after its content, as given or stripped, else before `turn.after`."""
    if text.startswith(turn.lead, start):
        begin = start + len(turn.lead)
        for written in (content, content.strip()):
            end = begin + len(written)
            if text.startswith(written, begin) and _is_followed(text, end, turn):
                return end
    # The template changed the content itself, as Qwen3's does with reasoning in earlier turns. The text after the turn
    # then marks its end, unless the content contains that text as well.
    if turn.is_verbatim or turn.after in content:
        return None
    end = len(text) - len(turn.after) if turn.is_last else text.find(turn.after, start)
    return end if end >= start and _is_followed(text, end, turn) else None


def _is_followed(text: str, end: int, turn: Turn) -> bool:
    return text.startswith(turn.after, end) and (not turn.is_last or end + len(turn.after) == len(text))
