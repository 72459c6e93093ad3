"""Keeps two launches of one run apart: rank 0 of a launch holds a lease in the run folder while it writes there.

A lease is a file in `.lease/`, named by nobody else. No lock and no clock is trusted, so hosts may share the folder by
NFS.

- Take: while there are only stale leases, create one, then list the folder. Of launches that do so at the same time
  each sees the others' or is seen by them. Who sees one that was not stale before withdraws, and looks again later.
  Who sees none removes the stale ones, and holds the run.
- Hold: every `RENEW_EVERY` seconds a thread moves the file's time on by as much.
- Stale: its process has ended (known on the same host only), or belongs to an earlier start of the same launch, or the
  file's time has not moved in `STALE_AFTER` seconds of looking at it. If it moves, the newcomer is refused.
- Lose: a holder that was suspended or cut off for so long finds its file gone. It looks before each write, and after
  each pause of its thread, and then ends without writing. Only a write that is under way cannot be recalled.
"""

import contextlib
import math
import os
import random
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.publish import write_atomically
from data_prep.user_error import UserError
from trainer.run.launch_protocol import FAULT, Ending, write_ending
from trainer.run.lease_holder import LeaseHolder

FOLDER = ".lease"
RENEW_EVERY, STALE_AFTER = 5.0, 30.0  # seconds
LOOKS_PER_RENEWAL = 10


@dataclass(frozen=True)
class _Lease:
    """Another launch's lease at one look. holder: None where it cannot be read. renewed: its time, in ns."""

    holder: LeaseHolder | None
    renewed: int

    def is_over(self) -> bool:
        return self.holder is not None and (self.holder.is_of_this_launch() or self.holder.has_ended())

    def __str__(self) -> str:
        return str(self.holder or "a launch whose lease is damaged")


class RunLease:
    """The lease of a run folder, for one process, once. renew_every, stale_after: seconds.

    patience: seconds that the other ranks wait for this one (run.start_timeout).
    """

    def __init__(
        self,
        directory: Path,
        patience: float = math.inf,
        renew_every: float = RENEW_EVERY,
        stale_after: float = STALE_AFTER,
    ) -> None:
        self.directory, self.patience = directory, patience
        self.renew_every, self.stale_after = renew_every, stale_after
        self._path = _unique_path(directory)
        self._first_looks: dict[str, _Lease] = {}
        self._looks: Counter[str] = Counter()
        self._waiting = False
        self._released = threading.Event()
        self._ending = threading.Lock()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Takes the lease, and releases it after the block.

        Raises UserError where another launch holds it, within two `renew_every`. Waits a little over `stale_after` for
        a stale one whose process may still be there. Raises OSError where the folder cannot be written.
        """
        try:
            self._take()
            threading.Thread(target=self._renew_until_released, name="lease", daemon=True).start()
            yield
        finally:
            self._released.set()
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
                self._path.parent.rmdir()  # fails where another launch has a lease there

    def check(self) -> None:
        """Ends the process if it has lost the lease. Call it before each write into the run folder.

        Raises OSError after the release: a save may outlive the training while the process ends.
        """
        try:
            self._path.open("rb").close()  # opened: an NFS client then asks the server, not its memory
        except FileNotFoundError:
            if self._released.is_set():
                raise OSError(f"the lease of {self.directory} is released") from None
            if self.directory.is_dir():  # else its disk is not there, and neither is another launch
                self._end()
        except OSError:  # nothing is known; the write itself will fail
            pass

    def _end(self) -> None:
        self._ending.acquire()  # for good: of all threads that notice one says so
        line = (
            f"{self.directory}: this launch has lost the run to another, which found it suspended or cut off from the "
            f"disk for {self.stale_after:g} s (or {self._path.parent} was removed); it ends without writing more"
        )
        print(f"error: {line}", file=sys.stderr, flush=True)
        write_ending(Ending(FAULT, line))
        os._exit(FAULT)  # without cleaning up, which would write

    def _take(self) -> None:
        while True:
            stale = self._wait_until_stale()
            with contextlib.suppress(FileNotFoundError):  # another launch has just ended and removed the folder
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._path, LeaseHolder.of_this_process().model_dump_json())
                others = self._others()
                if others.items() <= stale.items():  # no new one, and none has been renewed since
                    for name in others:
                        self._path.with_name(name).unlink(missing_ok=True)
                    return
                self._path.unlink()
            self._path = _unique_path(self.directory)  # who has seen the first would take this one for its renewal
            time.sleep(random.uniform(0, self.renew_every / 5))

    def _wait_until_stale(self) -> dict[str, _Lease]:
        """Returns the leases in the folder once all are stale. Raises UserError where one is renewed."""
        while True:
            found = self._others()
            fresh = [name for name, lease in found.items() if not lease.is_over() and not self._is_stale(name, lease)]
            if not fresh:
                return found
            if not self._waiting:
                self._waiting = True
                self._announce(fresh[0], found[fresh[0]])
            time.sleep(self.renew_every / LOOKS_PER_RENEWAL)

    def _is_stale(self, name: str, lease: _Lease) -> bool:
        """Whether it is as it was at the first of enough looks. Raises UserError where it is not."""
        if lease != self._first_looks.setdefault(name, lease):
            raise UserError(
                f"{self.directory}: another launch trains there: {lease}; wait until it ends, stop it (after SIGTERM "
                "it saves first), or give another run.name"
            )
        self._looks[name] += 1
        return self._looks[name] > LOOKS_PER_RENEWAL * self.stale_after / self.renew_every

    def _announce(self, name: str, lease: _Lease) -> None:
        """Says what this launch waits for. Raises UserError where its other ranks would not wait as long."""
        longest = self.stale_after + self.renew_every
        if longest > self.patience:
            raise UserError(
                f"run.start_timeout={self.patience:g}: expected at least {longest:g} to see whether another launch "
                f"still trains in {self.directory}: {lease}; raise it, or remove {self._path.with_name(name)} if that "
                "launch has ended"
            )
        print(f"lease           {lease}: looking for up to {longest:g} s whether it still trains here", flush=True)

    def _others(self) -> dict[str, _Lease]:
        """{name: lease} of the other launches that have one in the folder."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for path in self._path.parent.iterdir():
                if path.name.startswith(".") or path == self._path:
                    continue
                # opened before its time is asked for: an NFS client then asks the server, not its memory
                with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
                    found[path.name] = _Lease(LeaseHolder.parse(file.read()), os.fstat(file.fileno()).st_mtime_ns)
        return found

    def _renew_until_released(self) -> None:
        while not self._released.wait(self.renew_every):
            with contextlib.suppress(OSError):
                self.check()
                later = self._path.stat().st_mtime_ns + int(self.renew_every * 1e9)
                os.utime(self._path, ns=(later, later))


def _unique_path(directory: Path) -> Path:
    return directory / FOLDER / secrets.token_hex(8)
