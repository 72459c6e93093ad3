import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import scene

LIMIT = 600  # seconds for all cases of one rank count


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return scene.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session", params=scene.WORLDS, ids=lambda world: f"{world}ranks")
def seen(request, base, tmp_path_factory) -> tuple[int, Path]:
    """(ranks, folder): what the ranks of one process group left after running every case."""
    world, folder = request.param, tmp_path_factory.mktemp(f"ranks{request.param}")
    run_ranks(world, ["-m", "tests.distributed.worker", str(base), str(folder)])
    return world, folder


def run_ranks(world: int, arguments: list[str]) -> None:
    """Runs one Python command as `world` ranks; the first that fails ends the others and fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=LIMIT)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for index, rank in enumerate(ranks):
        assert rank.returncode == 0, f"rank {index} of {world}:\n{said[index][-6000:]}"
