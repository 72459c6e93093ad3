"""Faults in the middle of a run on two emulated hosts, and the cause that the launch must report for each."""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.cluster.emulated import Cluster

# For every Python process whose PYTHONPATH names its folder: SIGUSR2 raises an exception wherever the process is, of a
# kind that nothing there catches.
RAISES = """
import signal
class DiskOnFire(Exception): pass
def _raise(number, frame):
    raise DiskOnFire("write failed")
signal.signal(signal.SIGUSR2, _raise)
"""


@dataclass(frozen=True)
class Fault:
    """harm: done to the hosts on entering, and undone on leaving if needed. cause: how the reported line begins."""

    harm: Callable[[Cluster], AbstractContextManager]
    cause: str


def write_raises(folder: Path) -> None:
    """Writes what "exception on one rank" needs to a folder for PYTHONPATH."""
    (folder / "sitecustomize.py").write_text(RAISES)


def _to_rank(number: int, action: Callable[[psutil.Process], None]) -> Callable[[Cluster], AbstractContextManager]:
    @contextmanager
    def harm(cluster: Cluster) -> Iterator[None]:
        action(list(cluster.nodes.values())[number].ranks()[number])
        yield

    return harm


@contextmanager
def _first_rank_and_second_launcher_suspended(cluster: Cluster) -> Iterator[None]:
    """The second rank then ends, and its launcher does not."""
    first, second = cluster.nodes.values()
    second.ranks()[1].parent().suspend()
    first.ranks()[0].suspend()
    yield


KILLED = "killed from outside (SIGKILL, or out of memory)"
SUSPENDED = "was suspended (SIGSTOP or a debugger), and was killed"
FAULTS = {
    "first rank killed": Fault(_to_rank(0, psutil.Process.kill), f"node-a, rank 0: {KILLED}"),
    "second rank killed": Fault(_to_rank(1, psutil.Process.kill), f"node-b, rank 1: {KILLED}"),
    "first rank suspended": Fault(_to_rank(0, psutil.Process.suspend), f"node-a, rank 0: {SUSPENDED}"),
    "second rank suspended": Fault(_to_rank(1, psutil.Process.suspend), f"node-b, rank 1: {SUSPENDED}"),
    "first rank and second launcher suspended": Fault(
        _first_rank_and_second_launcher_suspended, f"node-a, rank 0: {SUSPENDED}"
    ),
    "exception on one rank": Fault(
        _to_rank(1, lambda rank: rank.send_signal(signal.SIGUSR2)), "node-b, rank 1: DiskOnFire: write failed"
    ),
    "link down": Fault(lambda cluster: cluster.cut_off("node-b"), "node-b: "),
}
