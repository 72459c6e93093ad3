"""Starts one Python command as several ranks on this machine; benchmarks and distributed tests use it."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def run_ranks(world: int, arguments: Sequence[str], limit: float = 600) -> list[str]:
    """Runs `python ARGUMENTS` as `world` ranks of one thread each and returns what each printed.

    Raises RuntimeError with a rank's last words if one fails, and ends the others; TimeoutExpired after `limit`
    seconds.
    """
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
        said = [rank.communicate(timeout=limit)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for index, rank in enumerate(ranks):
        if rank.returncode:
            raise RuntimeError(f"rank {index} of {world} ended with {rank.returncode}:\n{said[index][-6000:]}")
    return said
