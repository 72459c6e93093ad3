"""The rows that the suite's recipe makes of each task, before they are split."""

import functools
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import pytest

from data_prep.config import ReasoningGymSource, Source
from data_prep.sources.gym import GymProcess
from data_prep.suite.rows import Row
from data_prep.suite.tasks import TASKS, rows_of
from trainer.recipe_file import load_recipe

RECIPE = Path("launch/recipes/suite.yaml")
SOURCES: dict[str, Source] = {source.task: source for source in load_recipe(RECIPE).data.sources}
OWN = [task for task, source in SOURCES.items() if source.type == "suite"]


def skip_without_packages(*tasks: str) -> None:
    for package in sorted({package for task in tasks if task in TASKS for package in TASKS[task].packages}):
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"needs the package {package}: bash launch/install.sh suite")


@functools.cache
def rows_in_recipe(task: str) -> list[Row]:
    """In their order; a question of reasoning-gym is about itself."""
    skip_without_packages(task)
    source = SOURCES[task]
    if isinstance(source, ReasoningGymSource):
        documents = GymProcess().documents(source, "data.sources.0", dict.fromkeys(range(source.count), ""))
        turns = [document.messages for document in documents]
        return [Row(question["content"], question["content"], answer["content"]) for question, answer in turns]
    return list(islice(rows_of(task, source.seed), source.count))
