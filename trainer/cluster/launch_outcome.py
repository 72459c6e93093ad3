"""Derives a launch's outcome from how each rank ended: an exit status and one line that gives the cause."""

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.run.crash import CAUSES
from trainer.run.launch_protocol import FAULT, MISTAKE, STOPPED, Ending

KILLED = "killed from outside (SIGKILL, or out of memory)"
OUT_OF_MEMORY = (
    "killed by the system: the memory of the machine, or that of a limit (container, Slurm, systemd), was used up: "
    "take fewer ranks per host or no offload, or raise the limit"
)


@dataclass(frozen=True)
class RankEnding:
    """How one rank ended, as its node's launcher saw it. stuck: it had to be killed after other ranks had failed."""

    rank: int
    ending: Ending
    stuck: bool = False

    @property
    def own_fault(self) -> bool:
        """Whether it failed and gave the cause itself: not killed, and not ended because of another rank."""
        killed = self.ending.line in (KILLED, OUT_OF_MEMORY)
        return self.ending.failed and not (self.stuck or self.ending.followed or killed)


@dataclass(frozen=True)
class Outcome:
    """cause: one line for users if a fault ended the launch, else empty."""

    status: int
    cause: str = ""


def outcome(endings: Iterable[tuple[str, RankEnding]], launchers: Iterable[int], stopping: bool) -> Outcome:
    """Combines the endings of all ranks.

    endings: (prefix that names the node, ending), in the order in which they were observed. launchers: exit statuses of
    DeepSpeed's launchers. stopping: the ranks had been asked to stop; then they count as stopped, unless a rank reports
    a failure of its own. If several ranks failed, the cause is the first one that did not merely follow another rank,
    and preferably one that was not stuck.
    """
    endings, launchers = list(endings), list(launchers)
    statuses = {each.ending.status for _, each in endings}
    failed = [(where, each) for where, each in endings if each.ending.failed]
    if MISTAKE in statuses:
        return Outcome(MISTAKE)
    first_rank = next((each.ending.status for _, each in endings if each.rank == 0), None)
    if first_rank == 0 and not failed:  # the run is finished, even where a launcher was killed or stopped meanwhile
        return Outcome(0)
    killed = next((-status for status in launchers if status < 0), None)
    if killed is not None and not failed and not stopping:  # then the ranks were stopped by whoever watches them
        return Outcome(FAULT, f"DeepSpeed's launcher: killed from outside ({signal.Signals(killed).name})")
    if first_rank == STOPPED:
        return Outcome(STOPPED)
    if not failed:
        status = next((abs(status) for status in launchers if status != 0), 0)
        return Outcome(STOPPED if stopping and status not in (0, MISTAKE) else status)
    where, first = min(failed, key=lambda pair: (pair[1].ending.followed, pair[1].stuck))  # of equals, the first
    line = _crash(launchers) or KILLED if first.ending.line == KILLED else first.ending.line
    stopped = stopping and not any(each.own_fault for _, each in failed)
    return Outcome(STOPPED if stopped else FAULT, f"{where}rank {first.rank}: {line}")


def _crash(launchers: Sequence[int]) -> str | None:
    """What ended a rank that a signal ended before it could leave its stacks.

    DeepSpeed's launcher exits with minus the signal's number, in a byte.
    """
    number = next((256 - status for status in launchers if 256 - status in CAUSES), None)
    return f"ended by {signal.Signals(number).name}: {CAUSES[number]}" if number else None
