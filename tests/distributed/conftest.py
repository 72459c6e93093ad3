from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.parity_cases import ParityCase
from tests.support import scene
from tests.support.ranks import run_ranks


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks_run(*names): what of tests.distributed.worker the ranks run for a test")


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return scene.make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session", params=scene.WORLDS, ids=lambda world: f"{world}ranks")
def seen(request, base, tmp_path_factory) -> tuple[int, Path]:
    """(ranks, folder): what the ranks of one process group left after running the cases of the selected tests."""
    world, folder = request.param, tmp_path_factory.mktemp(f"ranks{request.param}")
    names = selected_names(request.session.items, world)
    run_ranks(world, ["-m", "tests.distributed.worker", str(base), str(folder), ",".join(names)])
    return world, folder


def selected_names(items: Sequence[pytest.Item], world: int) -> list[str]:
    """Names of the parity cases and of the worker's checks that these tests read from this many ranks."""
    names: set[str] = set()
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("seen") != world:
            continue
        case = parameters.get("case")
        if isinstance(case, ParityCase) and world in case.worlds:
            names.add(case.name)
        for mark in item.iter_markers("ranks_run"):
            names.update(mark.args)
    return sorted(names)
