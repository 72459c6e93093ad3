"""Starts one Python command as several ranks on this machine, for distributed tests and benchmarks."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import TextIO


def run_ranks(
    world: int,
    arguments: Sequence[str],
    limit: float = 1800,
    within: Sequence[Sequence[str]] | None = None,
    master: str = "127.0.0.1",
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Runs `python ARGUMENTS` as `world` ranks of one thread each and returns what each printed.

    within: for each rank, words before the command (`ip netns exec NAME`, say); master: rank 0's address as seen there.
    environment: variables beside those of this process and of the launch.

    Raises RuntimeError with a rank's last words if one fails, and ends the others; TimeoutExpired after `limit`
    seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": master, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        # Files, not pipes: nobody reads a pipe while another rank is waited for, and a full one stops its writer.
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world)]
        ranks = [
            subprocess.Popen(
                [*(within[rank] if within else ()), sys.executable, *arguments],
                env={**os.environ, **(environment or {}), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank, output in enumerate(outputs)
        ]
        ending = time.monotonic() + limit
        try:
            for rank in ranks:
                rank.wait(timeout=max(ending - time.monotonic(), 0))
        finally:
            for rank in ranks:
                rank.kill()
        said = [_told(output) for output in outputs]
    for index, rank in enumerate(ranks):
        if rank.returncode:
            raise RuntimeError(f"rank {index} of {world} ended with {rank.returncode}:\n{said[index][-6000:]}")
    return said


def _told(output: TextIO) -> str:
    output.seek(0)
    return output.read()
