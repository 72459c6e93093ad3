"""Runs a function on generated input and counts the outcomes. There are two: it is accepted, or refused in one line.

Everything else fails the test: another exception (the command would print a traceback), a refusal over several lines,
an example that takes too long, a file that a refusal leaves behind.
"""

import contextlib
import functools
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from data_prep.user_error import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))  # over all tests; `bash tests/run.sh fuzz` sets it
LONG = "FUZZ_EXAMPLES" in os.environ
HANG = 20.0  # seconds for one example, which takes milliseconds: a busy machine is no hang
PROPERTY = "fuzz"  # how a test's counts travel with its report, from pytest-xdist's workers too


class Hang(BaseException):
    """An example took too long. No Exception, which the code under test may catch."""


class Outcomes:
    """Counts of one test's examples, and of the outcomes of what was asked of each, which may be several things."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter({"examples": 0, "accepted": 0, "refused": 0})

    def of(self, call: Callable[[], Any]) -> Any | None:
        """What the call returns; None where it refuses in one line."""
        try:
            with _limit(HANG):
                result = call()
        except UserError as refusal:
            check_one_line(str(refusal))
            self.counts["refused"] += 1
            return None
        self.counts["accepted"] += 1
        return result


def fuzz(share: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis settings of a test that takes this share of all examples. The short run is the same each time."""
    chosen = settings(
        max_examples=max(1, round(share * EXAMPLES)),
        derandomize=not LONG,
        database=None,
        deadline=None,  # see HANG: one number for every machine
        print_blob=True,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],  # without explain, which traces every line
        suppress_health_check=list(HealthCheck),
    )

    def decorate(test: Any) -> Callable[..., None]:
        test.hypothesis.inner_test = _counted(test.hypothesis.inner_test)
        return chosen(test)

    return decorate


def _counted(test: Callable[..., None]) -> Callable[..., None]:
    """The body of a test, which hypothesis calls once per example, counted."""

    @functools.wraps(test)
    def counted(*given: Any, outcomes: Outcomes, **named: Any) -> None:
        test(*given, outcomes=outcomes, **named)
        outcomes.counts["examples"] += 1  # not one that hypothesis could not draw to its end

    return counted


def check_one_line(text: str) -> None:
    """A refusal is one line to a terminal as to Python, and says something."""
    assert text.strip(), "an empty refusal"
    assert len(text.splitlines()) == 1, text
    assert text.isprintable(), text


@contextlib.contextmanager
def writes_nothing(folder: Path) -> Iterator[None]:
    """Within, no file of the folder appears, changes or goes."""
    before = files_of(folder)
    yield
    assert files_of(folder) == before


def files_of(folder: Path) -> dict[Path, bytes | None]:
    """{path: content} of everything below a folder; None for what is no file."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise Hang(f"no end after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def outcomes(record_property: Callable[[str, object], None]) -> Iterator[Outcomes]:
    found = Outcomes()
    yield found
    examples = found.counts["examples"] or 1  # a test without a strategy is one example itself
    record_property(PROPERTY, {**found.counts, "examples": examples})
