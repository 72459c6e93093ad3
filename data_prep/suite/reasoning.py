"""Problems with one right answer that need no package: syllogisms and dates."""

import datetime
import functools
import itertools
import random
from collections.abc import Iterator

from data_prep.suite.rows import Row

YES, NO, UNKNOWN = "yes", "no", "unknown"
_VERDICTS = (YES, NO, UNKNOWN)
_GROUPS = (
    "actors", "bakers", "climbers", "dancers", "doctors", "drivers", "farmers", "fishers", "gardeners", "judges",
    "lawyers", "painters", "parents", "pilots", "poets", "runners", "sailors", "singers", "students", "swimmers",
    "tailors", "teachers", "voters", "writers",
)  # fmt: skip
_FORMS = ("All {} are {}.", "No {} are {}.", "Some {} are {}.", "Some {} are not {}.")
_SYMMETRIC = (1, 2)
_REGIONS = tuple(itertools.product((False, True), repeat=3))  # membership in each of three groups
_FIRST_DAY, _LAST_DAY = datetime.date(2000, 1, 1), datetime.date(2049, 12, 31)
_MOST_DAYS = 9
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

Statement = tuple[int, int, int]  # index into _FORMS, and the indices of its two groups, out of three


def syllogisms(rng: random.Random) -> Iterator[Row]:
    """Whether two premises imply a statement, rule it out, or neither; in turn, so all verdicts are equally common.

    All are of Aristotle's first figure, with the terms in a row: A and B, B and C, so A and C. Leaves out syllogisms
    whose verdict depends on whether groups may be empty.
    """
    by_verdict = _syllogisms()
    for verdict in itertools.cycle(_VERDICTS):
        first, second, conclusion = rng.choice(by_verdict[verdict])
        names = rng.sample(_GROUPS, 3)
        asked = _in_words(conclusion, names)
        question = (
            f"{_in_words(first, names)} {_in_words(second, names)} Is it true that {asked[0].lower()}{asked[1:-1]}? "
            "Answer yes, no or unknown."
        )
        entity = [*sorted((_fact(first, names), _fact(second, names))), _fact(conclusion, names)]
        yield Row(" ".join(entity), question, verdict, _VERDICTS)


def dates(rng: random.Random) -> Iterator[Row]:
    """The date 2 to 9 days after or before another."""
    while True:
        days = rng.randrange((_LAST_DAY - _FIRST_DAY).days + 1)
        day = _FIRST_DAY + datetime.timedelta(days=days)
        offset = rng.randint(2, _MOST_DAYS)
        sign, word = rng.choice([(1, "after"), (-1, "before")])
        answer = day + datetime.timedelta(days=sign * offset)
        yield Row(
            f"{min(day, answer)} {max(day, answer)}", f"What date is {offset} days {word} {_long(day)}?", _long(answer)
        )


def _long(day: datetime.date) -> str:
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"  # strftime would use the locale's month names


def _in_words(statement: Statement, names: list[str]) -> str:
    form, subject, predicate = statement
    return _FORMS[form].format(names[subject], names[predicate])


def _fact(statement: Statement, names: list[str]) -> str:
    """Equal for equivalent statements, such as "no poets are voters" and "no voters are poets"."""
    form, *groups = statement
    named = [names[group] for group in groups]
    return _FORMS[form].format(*(sorted(named) if form in _SYMMETRIC else named))


@functools.cache
def _syllogisms() -> dict[str, list[tuple[Statement, Statement, Statement]]]:
    """By verdict: premises about groups 0 and 1 and about 1 and 2, and a statement about 0 and 2."""
    found: dict[str, list[tuple[Statement, Statement, Statement]]] = {verdict: [] for verdict in _VERDICTS}
    for first, second, conclusion in itertools.product(range(len(_FORMS)), repeat=3):
        syllogism = ((first, 0, 1), (second, 1, 2), (conclusion, 0, 2))
        verdict = _verdict(*syllogism)
        if verdict is not None:
            found[verdict].append(syllogism)
    return found


def _verdict(first: Statement, second: Statement, conclusion: Statement) -> str | None:
    """None if the verdict depends on whether groups may be empty."""
    verdicts = set()
    for worlds in (_worlds(), tuple(filter(_all_groups_have_members, _worlds()))):
        truths = {_holds(conclusion, w) for w in worlds if _holds(first, w) and _holds(second, w)}
        verdicts.add(UNKNOWN if len(truths) != 1 else YES if truths == {True} else NO)
    return verdicts.pop() if len(verdicts) == 1 else None


@functools.cache
def _worlds() -> tuple[tuple[tuple[bool, ...], ...], ...]:
    """Every choice of regions that are not empty."""
    return tuple(
        tuple(itertools.compress(_REGIONS, chosen)) for chosen in itertools.product((0, 1), repeat=len(_REGIONS))
    )


def _all_groups_have_members(world: tuple[tuple[bool, ...], ...]) -> bool:
    return all(any(person[group] for person in world) for group in range(3))


def _holds(statement: Statement, world: tuple[tuple[bool, ...], ...]) -> bool:
    form, subject, predicate = statement
    found = {person[predicate] for person in world if person[subject]}
    return (False not in found, True not in found, True in found, False in found)[form]
