"""A row of the suite: one question about one entity, and its answer."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Row:
    """A question and its answer.

    `entity` is what the row is about: a word, a country, a number, a problem. A task has one row per entity, so the two
    sides of a split never share a fact. `choices` are empty, or contain the answer once.
    """

    entity: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()


def in_random_order(items: Iterable[Item], rng: random.Random) -> list[Item]:
    """A shuffled copy. The items need a reproducible order, which sets lack."""
    shuffled = list(items)
    rng.shuffle(shuffled)
    return shuffled
