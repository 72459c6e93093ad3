"""The special tokens that a chat template ends assistant turns with, found per turn.

Ordinary answers show what a template does: most write a token of their own after every answer, some another one after
the last, and some none, so the marker of the next turn is what stops. Turns with tool calls may end with yet another
token: it is the last one of the text that the template writes if the conversation ends there.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from data_prep.documents import Message
from data_prep.user_error import UserError

_PROBES = (("user", "assistant", "user", "assistant"), ("user", "assistant"))


@dataclass(frozen=True, slots=True)
class TurnEnds:
    """How one template ends assistant turns."""

    special: re.Pattern[str]  # one special token, as a group
    common: str  # what stands after every ordinary answer, through the last special token; empty if that differs
    tokens: frozenset[str]  # that end ordinary answers; empty if the template writes none

    def after_content(self, after: str) -> int:
        """How much of the text after an ordinary answer belongs to it: its end, or else the next special token."""
        if self.common and after.startswith(self.common):
            return len(self.common)
        return self._through_next(after, 0) or 0

    def within(self, own: str, after: str) -> int | None:
        """Where a turn that begins `after` ends; None if that cannot be known.

        own: the turn where the conversation ends with it, to its last character.
        """
        if self.tokens:
            shared = "".join(_shared(self.special.split(own), self.special.split(after)))
            ends = [found.end() for found in self.special.finditer(shared)]
            if ends and not self.special.split(own[ends[-1] :])[0].strip():  # nothing but another token may follow
                return ends[-1]
        written = own.rstrip()
        if not written or not after.startswith(written):
            return None
        return self._through_next(after, len(written)) or len(written)

    def last_token(self, text: str) -> str:
        """The special token that a text ends with, or an empty string."""
        *_, token, rest = ["", *self.special.split(text)]
        return token if not rest.strip() else ""

    def usual(self, text: str) -> list[int]:
        """Where tokens that end ordinary answers end in a text."""
        return [found.end() for found in self.special.finditer(text) if found[0] in self.tokens]

    def _through_next(self, text: str, begin: int) -> int | None:
        """One past the special token that comes next, if only whitespace is before it."""
        found = self.special.search(text, begin)
        return found.end() if found and not text[begin : found.start()].strip() else None


def find_turn_ends(specials: Iterable[str], write: Callable[[list[Message], str], str]) -> TurnEnds:
    """Renders a conversation or two. write: takes messages and the name of their place."""
    longest_first = sorted(specials, key=lambda token: (-len(token), token))
    special = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
    afters = _after_answers(write)
    if not afters:
        return TurnEnds(special, "", frozenset())
    pieces = [special.split(after) for after in afters]
    shared = _shared(*pieces) if len(pieces) > 1 else pieces[0][:2]
    if len(shared) > 1:
        common = shared[: len(shared) // 2 * 2]  # through the last special token
        return TurnEnds(special, "".join(common), frozenset(common[-1:]))
    plain = TurnEnds(special, "", frozenset())
    if not plain.after_content(afters[-1]):
        return plain  # nothing after the last answer: what follows others begins the next turn
    tokens = (plain.last_token(after[: plain.after_content(after)]) for after in afters)
    return TurnEnds(special, "", frozenset(token for token in tokens if token))


def _after_answers(write: Callable[[list[Message], str], str]) -> list[str]:
    """The template's text after each of two answers, the last one last, or after one if it refuses two."""
    for roles in _PROBES:
        messages = [{"role": role, "content": f"<<probe:{index}>>"} for index, role in enumerate(roles)]
        try:
            text = write(messages, "the chat template")
        except UserError:
            continue
        afters = (text.partition(f"<<probe:{index}>>") for index in range(1, len(roles), 2))
        return [after.partition("<<probe:")[0] for _, found, after in afters if found]
    return []


def _shared(first: list[str], second: list[str]) -> list[str]:
    """The longest common beginning of two texts that are split at special tokens."""
    shared = []
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        shared.append(one)
    return shared
