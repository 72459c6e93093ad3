from pathlib import Path

import pytest

from tests.support import scene
from tests.support.ranks import run_ranks


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return scene.make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session", params=scene.WORLDS, ids=lambda world: f"{world}ranks")
def seen(request, base, tmp_path_factory) -> tuple[int, Path]:
    """(ranks, folder): what the ranks of one process group left after running every case."""
    world, folder = request.param, tmp_path_factory.mktemp(f"ranks{request.param}")
    run_ranks(world, ["-m", "tests.distributed.worker", str(base), str(folder)])
    return world, folder
