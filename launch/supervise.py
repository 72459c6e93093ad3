"""What `bash launch/train.sh` runs: DeepSpeed's launcher, signals handed on to the ranks, and retries after faults.

DeepSpeed's launcher does neither. On one node its first process has no handler: a signal ends it and leaves the ranks
running. Its second ends the ranks one after the other and returns 1, whatever they return.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.errors import UserError
from trainer.launch_protocol import LAUNCH_ID, MISTAKE, STATUS_FILE, STOPPED

SCRIPT = Path(__file__).with_name("train.sh")
LOOK_EVERY = 0.2  # seconds
GRACE = 60.0  # seconds that ranks have to end once their launcher has


class Launch:
    """One start of all ranks, in a session of its own: so they are found however their parents end."""

    def __init__(self, launcher_options: Sequence[str], arguments: Sequence[str], status_file: Path) -> None:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning", *launcher_options]
        if "--master_port" not in launcher_options:  # the usual one may be another run's, or of a rank left behind
            command += ["--master_port", str(_free_port())]
        self._status_file = status_file
        self._launcher = subprocess.Popen(
            [*command, str(SCRIPT), *arguments],
            start_new_session=True,
            env={**os.environ, STATUS_FILE: str(status_file), LAUNCH_ID: secrets.token_hex(8)},
        )
        self._told: set[int] = set()  # ranks that have been told to stop

    def wait(self, stop: "Stop") -> int:
        """The exit status, when no process of the launch is left."""
        while self._launcher.poll() is None:
            self._hand_on(stop)
            time.sleep(LOOK_EVERY)
        if self._launcher.returncode < 0:  # it was ended itself; its ranks do not know
            stop.asked = stop.asked or signal.SIGTERM
        ending = time.monotonic() + GRACE
        while left := list(self._processes()):
            self._hand_on(stop)
            if time.monotonic() > ending or stop.at_once:
                for process in left:
                    process.kill()
            time.sleep(LOOK_EVERY)
        if self._status_file.exists() and self._status_file.read_text() == str(STOPPED):
            return STOPPED
        status = self._launcher.returncode
        return STOPPED if stop.asked and status not in (0, MISTAKE) else abs(status)

    def _hand_on(self, stop: "Stop") -> None:
        if stop.asked is None:
            return
        for process in self._processes():
            try:
                if stop.at_once:
                    process.kill()
                elif process.pid not in self._told and "RANK" in process.environ():
                    process.send_signal(stop.asked)
                    self._told.add(process.pid)
            except psutil.Error:  # it has ended, or is about to begin
                continue

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                mine = os.getsid(process.pid) == self._launcher.pid
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except (OSError, psutil.Error):
                continue


class Stop:
    """What this process was asked by signals: to let the ranks save and end, or (the second Ctrl-C) to end at once."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.at_once = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.at_once = number == signal.SIGINT and self.asked is not None
        self.asked = signal.SIGTERM if number == signal.SIGINT else signal.Signals(number)


def main(arguments: Sequence[str]) -> int:
    """Launches, and again after a fault, up to `retries` times: each start goes on from the last good checkpoint."""
    options, retries, passed = [], 0, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("num_gpus", "master_port"):
            options += [f"--{key}", value]
        elif key == "retries":
            retries = _retries(value)
        else:
            passed.append(argument)
    stop = Stop()
    for left in range(retries, -1, -1):
        with tempfile.TemporaryDirectory() as folder:
            status = Launch(options, passed, Path(folder) / "status").wait(stop)
        if status in (0, MISTAKE, STOPPED) or left == 0:
            return status
        print(f"launch          ended with status {status}; starting again, {left} retries left", flush=True)
    return status


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _retries(value: str) -> int:
    if not value.isdecimal():
        raise UserError(f"retries={value}: expected how often to start again after a fault, such as retries=3")
    return int(value)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
