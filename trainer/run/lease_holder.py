"""Who holds the lease of a run folder, and whether that process has ended."""

import contextlib
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.run.launch_protocol import LAUNCH_ID, launch_of


class LeaseHolder(BaseModel):
    """The process that holds a lease. since: UTC. kernel: the boot and the namespace that number the process.

    started: in clock ticks since that boot. launch, kernel, started: None where unknown.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    since: str
    launch: str | None
    kernel: str | None
    started: str | None

    @classmethod
    def of_this_process(cls) -> "LeaseHolder":
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            pid=pid,
            since=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            launch=launch_of(os.environ.get(LAUNCH_ID)),
            kernel=_kernel(),
            started=_start_and_state(pid)[0],
        )

    @classmethod
    def parse(cls, content: str) -> "LeaseHolder | None":
        """From a lease's text; None for a damaged one."""
        try:
            return cls.model_validate_json(content)
        except ValidationError:
            return None

    def is_of_this_launch(self) -> bool:
        """Whether an earlier start of this process's launch held it: before a retry, or before a requeue."""
        return self.launch is not None and self.launch == launch_of(os.environ.get(LAUNCH_ID))

    def has_ended(self) -> bool:
        """Whether the process is known to have ended. False for another host's, of which nothing is known."""
        if self.kernel is None or self.kernel != _kernel():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's
            pass
        started, state = _start_and_state(self.pid)
        return state == "Z" or (started is not None and started != self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _kernel() -> str | None:
    with contextlib.suppress(OSError):  # not Linux, or a sandbox that shows neither
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return None


def _start_and_state(pid: int) -> tuple[str | None, str | None]:
    """When a process started, in clock ticks since the boot, and its state (Z: it has ended); None where unknown."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return words[19], words[0]
    return None, None
