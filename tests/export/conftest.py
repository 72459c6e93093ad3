from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.finished_run import Run, finish_run, prepare_tasks


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder with a base and a prepared set."""
    return prepare_tasks(tmp_path_factory.mktemp("export"))


@pytest.fixture
def make_run(prepared, tmp_path) -> Callable[..., Run]:
    """Makes a run of a method, by `finish_run`."""

    def make(method: str = "teamlora", **options) -> Run:
        return finish_run(prepared, tmp_path / "runs" / method, method, **options)

    return make
