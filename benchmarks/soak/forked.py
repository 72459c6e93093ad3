"""Commands that are forks of a process that has imported everything: a start without its imports.

Imports are most of what a start costs, and few faults strike there. The server forks `teamlora launch`, which forks
DeepSpeed's launcher, which forks the ranks; from the fork on, each is as if it had been executed: its arguments,
environment, signals and session, also as other processes see them.

    python -m benchmarks.soak.forked        reads one JSON request per line, writes one JSON answer per line

A request names a command of `teamlora`, or `make_spare`, which needs the same imports.
"""

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from types import SimpleNamespace
from typing import Any

ROOM = 8192  # bytes that the server's own arguments and environment leave to those of its forks
MAKE_SPARE = "make_spare"
IMPORTS = (
    "trainer.training.train",
    "trainer.cluster.supervisor",
    "deepspeed.launcher.launch",
    "transformers.models.llama.modeling_llama",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
    "datasets",
    "benchmarks.soak.spare",
    "benchmarks.soak.kinds",
)


class Server:
    """The driver's side of it. seconds: that the imports took."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "benchmarks.soak.forked", "-" * ROOM],
            env={**environment, "ROOM": "-" * ROOM}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._statuses: dict[int, Queue[int]] = {}
        self._started: Queue[int] = Queue()
        assert self._process.stdout is not None
        if self._process.stdout.readline() != '"ready"\n':
            raise RuntimeError("the server of forked launches did not start")
        self.seconds = time.monotonic() - began
        threading.Thread(target=self._listen, daemon=True).start()

    def run(self, words: Sequence[str], folder: Path, log: Path, **environment: str) -> "Running":
        """`teamlora WORDS` in a folder. environment: added to the server's."""
        assert self._process.stdin is not None
        with self._lock:
            request = [list(words), str(folder), environment, str(log)]
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            pid = self._started.get()
        return Running(pid, self._statuses[pid])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            pid, status = json.loads(line)
            if status is None:
                self._statuses[pid] = Queue()
                self._started.put(pid)
            else:
                self._statuses[pid].put(status)


class Running:
    """As much of subprocess.Popen as is needed, of a child of the server."""

    def __init__(self, pid: int, statuses: Queue[int]) -> None:
        self.pid, self._statuses = pid, statuses

    def wait(self, timeout: float) -> int:
        try:
            return self._statuses.get(timeout=timeout)
        except Empty:
            raise subprocess.TimeoutExpired("teamlora", timeout) from None

    def has_ended(self) -> bool:
        return not self._statuses.empty()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class ForkedPopen:
    """subprocess.Popen of a Python program, as a fork of this process."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], start_new_session: bool = False, **options: Any
    ) -> None:
        self.returncode: int | None = None
        self.pid = fork(lambda: _become(list(command), env, start_new_session))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def fork(run: Callable[[], int | None]) -> int:
    """The child's pid; the child runs `run`, and ends with its status."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = run() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status & 0xFF)


def _become(command: list[str], environment: Mapping[str, str], new_session: bool) -> int | None:
    """What an executed program would be: DeepSpeed's launcher, or a rank."""
    if new_session:
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    show(command, {name: environment[name] for name in ("RANK", "LOCAL_RANK") if name in environment})
    arguments = command[command.index("-u") + 1 :]
    if arguments[:2] == ["-m", "deepspeed.launcher.launch"]:
        from deepspeed.launcher import launch as launcher

        launcher.subprocess = SimpleNamespace(Popen=ForkedPopen)
        sys.argv = arguments[1:]
        return launcher.main()
    from benchmarks.soak.phases import FOLDER, arm
    from trainer.cli import main

    if FOLDER in os.environ:
        arm()
    sys.argv = arguments
    return main(arguments[1:])


def show(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Puts a command line and variables where /proc shows this process's, over those of the server."""
    for name, value in os.environ.items():
        os.putenv(name, value)  # copies of those that lie where the server's were
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    texts = ("\0".join(command), "\0".join(f"{name}={value}" for name, value in environment.items()))
    for text, start, end in zip(texts, (fields[45], fields[47]), (fields[46], fields[48]), strict=True):
        size = int(end) - int(start)
        ctypes.memmove(int(start), (text.encode() + b"\0" * size)[:size], size)


def _command(words: list[str], folder: str, environment: dict[str, str], log: str) -> int:
    """`teamlora WORDS` in `folder`."""
    from trainer.cli import main
    from trainer.cluster import local_ranks

    os.chdir(folder)
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(environment)
    local_ranks.subprocess = SimpleNamespace(Popen=ForkedPopen)
    if words == [MAKE_SPARE]:
        return importlib.import_module("benchmarks.soak.spare").make_spare(Path.cwd())
    show([sys.executable, str(Path(local_ranks.__file__).parent.parent / "__main__.py"), *words], {})
    return main(words)


def serve() -> None:
    """Answers each request with [pid, null], and each end of a command with [pid, status]."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports print is no answer
    for name in IMPORTS:
        importlib.import_module(name)
    answers.write('"ready"\n')
    running: set[int] = set()
    while True:  # without threads of its own, which a fork would not have
        if select.select([0], [], [], 0.1)[0]:
            request = json.loads(sys.stdin.readline())
            pid = fork(lambda request=request: _command(*request))
            running.add(pid)
            answers.write(json.dumps([pid, None]) + "\n")
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                answers.write(json.dumps([pid, os.waitstatus_to_exitcode(status)]) + "\n")


if __name__ == "__main__":
    serve()
