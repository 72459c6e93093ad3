"""Skips these tests unless `bash tests/run.sh gpu` runs them on a machine with a GPU; collects the report there.

Written without a GPU: none of them has run yet. What they assert is meant; their first failure may be their own.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.eight_layers import EightLayers, make_eight_layers
from tests.support.gpu_report import GpuReport, describe_machine

HERE = Path(__file__).parent
REPORT = HERE.parent.parent / "build" / "gpu"
REPORT_KEY = pytest.StashKey[GpuReport]()
WANTED = "GPU_TESTS" in os.environ and torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    if WANTED:
        config.stash[REPORT_KEY] = GpuReport(describe_machine())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if not WANTED:
                item.add_marker(pytest.mark.skip(reason="needs a GPU: bash tests/run.sh gpu"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    found = yield
    if WANTED and (found.when == "call" or found.outcome != "passed"):
        item.config.stash[REPORT_KEY].results[item.nodeid.removeprefix("tests/gpu/")] = found.outcome
    return found


def pytest_sessionfinish(session: pytest.Session) -> None:
    if WANTED:
        session.config.stash[REPORT_KEY].write(REPORT)
        print(f"\nreport          {REPORT / 'report.md'}")


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> dict[str, float | str]:
    """Figures of the report, by name."""
    return request.config.stash[REPORT_KEY].figures


@pytest.fixture(scope="session")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> EightLayers:
    return make_eight_layers(tmp_path_factory.mktemp("eight-layers"))
