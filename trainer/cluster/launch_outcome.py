"""What became of a launch, from how each of its ranks ended: an exit status, and the one line that says why."""

import signal
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.run.launch_protocol import FAULT, MISTAKE, STOPPED, Ending

KILLED = "killed from outside, as by SIGKILL or for want of memory"


@dataclass(frozen=True)
class RankEnding:
    """How one rank ended, as its node's launcher saw it. stuck: it had to be killed, after others had failed."""

    rank: int
    ending: Ending
    stuck: bool = False

    @property
    def own_fault(self) -> bool:
        """It failed and said why itself; neither was it killed, nor did it only notice another's end."""
        return self.ending.failed and not (self.stuck or self.ending.followed or self.ending.line == KILLED)


@dataclass(frozen=True)
class Outcome:
    """cause: a line for a person where a fault ended the launch, else empty."""

    status: int
    cause: str = ""


def outcome(endings: Iterable[tuple[str, RankEnding]], launchers: Iterable[int], stopping: bool) -> Outcome:
    """endings: (where, how) in the order in which they were seen. launchers: exit statuses of DeepSpeed's launchers.

    stopping: the ranks had been asked to stop; they then have, unless one says itself that it failed. Of several that
    failed the cause is the first that does not only tell of another, and before one that was stuck.
    """
    endings = list(endings)
    statuses = {found.ending.status for _, found in endings}
    failed = [(where, found) for where, found in endings if found.ending.failed]
    if MISTAKE in statuses:
        return Outcome(MISTAKE)
    killed = next((-status for status in launchers if status < 0), None)
    if killed is not None and not failed and not stopping:  # the ranks were then asked to stop by who watches them
        return Outcome(FAULT, f"DeepSpeed's launcher: {KILLED} ({signal.Signals(killed).name})")
    if any(found.rank == 0 and found.ending.status == STOPPED for _, found in endings):
        return Outcome(STOPPED)
    if not failed:
        status = next((abs(status) for status in launchers if status != 0), 0)
        return Outcome(STOPPED if stopping and status not in (0, MISTAKE) else status)
    where, first = min(failed, key=lambda each: (each[1].ending.followed, each[1].stuck))  # min keeps the order
    stopped = stopping and not any(found.own_fault for _, found in failed)
    return Outcome(STOPPED if stopped else FAULT, f"{where}rank {first.rank}: {first.ending.line}")
