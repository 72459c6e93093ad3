"""A process that takes the lease of a run folder when asked to; one word per line on stdin, one line back on stdout."""

import itertools
import sys
import time
from pathlib import Path

from data_prep.user_error import UserError
from trainer.run.lease import RunLease


def hold(folder: Path, renew_every: float, stale_after: float, offset: float) -> None:
    """Tries to take the lease after `offset` seconds, says how that went, and holds it until the next line comes.

    While it holds, it writes its number into `journal` beside the folder, once before and once after.
    """
    time.sleep(offset)
    lease = RunLease(folder, renew_every=renew_every, stale_after=stale_after)
    try:
        with lease.held():
            journal = folder.with_name(f"{folder.name}.journal")
            _append(journal, "in")
            print("holds", flush=True)
            sys.stdin.readline()
            lease.check()
            _append(journal, "out")
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    else:
        print("released", flush=True)


def write_on(folder: Path, renew_every: float, stale_after: float) -> None:
    """Holds the lease and writes lines as fast as it can, each after a check. Says so after the first."""
    lease = RunLease(folder, renew_every=renew_every, stale_after=stale_after)
    with lease.held():
        for line in itertools.count():
            lease.check()
            _append(folder / "lines", str(line))
            if line == 0:
                print("writes", flush=True)


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


if __name__ == "__main__":
    print("ready", flush=True)
    for request in sys.stdin:
        action, folder, *numbers = request.split()
        {"hold": hold, "write_on": write_on}[action](Path(folder), *map(float, numbers))
