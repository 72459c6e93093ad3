"""What can go wrong in the midst of a run on two emulated hosts, and what the launch is to say of it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.cluster.emulated import Cluster

# For every Python of a launch whose PYTHONPATH names its folder: SIGUSR2 is an exception in the midst of what it does,
# of a kind that nobody catches there.
RAISES = """
import signal
class DiskOnFire(Exception): pass
def _raise(number, frame):
    raise DiskOnFire("write failed")
signal.signal(signal.SIGUSR2, _raise)
"""


@dataclass(frozen=True)
class Fault:
    """harm: done to the hosts on entering, undone where that is needed on leaving. cause: how the line begins."""

    harm: Callable[[Cluster], AbstractContextManager]
    cause: str


def write_raises(folder: Path) -> None:
    """What `raised` needs, in a folder for PYTHONPATH."""
    (folder / "sitecustomize.py").write_text(RAISES)


def _to_rank(number: int, deed: Callable[[psutil.Process], None]) -> Callable[[Cluster], AbstractContextManager]:
    @contextmanager
    def harm(cluster: Cluster) -> Iterator[None]:
        deed(list(cluster.nodes.values())[number].ranks()[number])
        yield

    return harm


KILLED = "killed from outside, as by SIGKILL or for want of memory"
HALTED = "was halted, as by SIGSTOP or a debugger, and was killed"
FAULTS = {
    "first rank killed": Fault(_to_rank(0, psutil.Process.kill), f"node-a, rank 0: {KILLED}"),
    "second rank killed": Fault(_to_rank(1, psutil.Process.kill), f"node-b, rank 1: {KILLED}"),
    "first rank halted": Fault(_to_rank(0, psutil.Process.suspend), f"node-a, rank 0: {HALTED}"),
    "second rank halted": Fault(_to_rank(1, psutil.Process.suspend), f"node-b, rank 1: {HALTED}"),
    "exception on one rank": Fault(
        _to_rank(1, lambda rank: rank.send_signal(signal.SIGUSR2)), "node-b, rank 1: DiskOnFire: write failed"
    ),
    "link down": Fault(lambda cluster: cluster.cut_off("node-b"), "node-b: "),
}
