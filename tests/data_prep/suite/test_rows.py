"""Every task of the suite: repeatable rows, one per entity, and no answer that can be guessed."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from data_prep.suite.tasks import TASKS, rows_of
from tests.data_prep.suite.rows import OWN, SOURCES, rows_in_recipe, skip_without_packages

# Expected rows of tasks that need no package, to notice if a machine, a Python version or a change alters them.
PINNED = {
    "dates": "50a82d1342be3b5bc82441c8d23310c32553a82769d83c95708e3b39aff303b3",
    "syllogisms": "f79047e9f6fbc0869a73bb8a770a1dccf86f6ad2c8963aed1ed084f416821a78",
}
DIGESTS = """
import hashlib, sys
from itertools import islice
from data_prep.suite.tasks import rows_of
for task in sys.argv[1:]:
    print(hashlib.sha256(repr(list(islice(rows_of(task, 0), 200))).encode()).hexdigest())
"""


def digest(task: str) -> str:
    return hashlib.sha256(repr(list(islice(rows_of(task, 0), 200))).encode()).hexdigest()


def test_the_recipe_has_every_task_of_the_suite_and_eleven_tasks_of_six_kinds():
    assert {*OWN} == {*TASKS}
    kinds = {TASKS[task].kind for task in OWN}
    assert len(SOURCES) >= 11 and len(kinds) >= 6


@pytest.mark.parametrize("task", OWN)
def test_a_task_has_one_row_per_entity_and_as_many_as_the_recipe_needs(task):
    rows = rows_in_recipe(task)
    assert len(rows) == SOURCES[task].count
    for part in ("entity", "question"):
        assert len({getattr(row, part) for row in rows}) == len(rows)


@pytest.mark.parametrize("task", OWN)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(task):
    rows = rows_in_recipe(task)
    again, other = (list(islice(rows_of(task, seed), len(rows))) for seed in (0, 1))
    assert again == rows and other != rows
    assert list(islice(rows_of(task, 0), 20)) == rows[:20]


def test_rows_do_not_depend_on_the_hash_seed_the_locale_or_the_zone():
    skip_without_packages(*OWN)
    environment = {**os.environ, "PYTHONHASHSEED": "12", "LC_ALL": "C", "LANGUAGE": "de", "TZ": "Pacific/Kiritimati"}
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, *OWN], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [digest(task) for task in OWN]


@pytest.mark.parametrize("task", PINNED)
def test_rows_that_come_from_no_package_stay_as_they_were(task):
    assert digest(task) == PINNED[task]


@pytest.mark.parametrize("task", SOURCES)
def test_no_answer_is_common(task):
    rows = rows_in_recipe(task)
    [(_, most)] = Counter(row.answer for row in rows).most_common(1)
    smallest = min(len(row.choices) for row in rows)
    assert most / len(rows) <= max(0.2, 1.02 / smallest if smallest else 0)


@pytest.mark.parametrize("task", OWN)
def test_choices_hold_the_answer_once(task):
    rows = rows_in_recipe(task)
    assert {bool(row.choices) for row in rows} == {SOURCES[task].metric == "choices"}
    for row in rows:
        assert not row.choices or row.choices.count(row.answer) == 1 < len(row.choices) == len({*row.choices})


@pytest.mark.parametrize("task", [task for task in OWN if task not in ("contacts", "syllogisms")])
def test_no_question_contains_its_answer(task):
    for row in rows_in_recipe(task):
        assert not re.search(rf"(?<![\w-]){re.escape(row.answer)}(?![\w-])", row.question, re.IGNORECASE), row
        assert row.answer == row.answer.strip() and row.answer


def test_hypernyms_and_definitions_are_about_different_meanings():
    first, second = ({row.entity for row in rows_in_recipe(task)} for task in ("hypernyms", "definitions"))
    assert first and second and not first & second


def test_no_word_stands_in_two_pairs_of_antonyms():
    words = [word for row in rows_in_recipe("antonyms") for word in row.entity.split()]
    assert len(words) == len({*words})


def test_the_page_names_every_task_and_every_package_with_its_version_and_license():
    page = Path("data_prep/suite/SUITE.md").read_text()
    pinned = dict(line.split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line[:60])
    versions = {name.lower().replace("-", "_"): number for name, number in pinned.items() if not name.startswith("#")}
    for task, source in SOURCES.items():
        line, *_ = [line for line in page.splitlines() if line.startswith(f"| {task} |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        packages = TASKS[task].packages if task in TASKS else ("reasoning-gym",)
        assert f"{source.count - 60} / 60" in cells or source.type == "reasoning_gym"
        assert (source.metric or "exact_match") in cells
        for package in packages:
            assert package in line
            assert re.search(
                rf"^\| {package} {versions[package.lower().replace('-', '_')]} \| .*\S", page, re.MULTILINE
            )
