"""Asks many machines what they are, all at once: one ssh and one thread for each."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.cluster.probe import Facts, Request
from trainer.cluster.ssh import REPOSITORY, allow_many_files, parsed, ssh_command

PROBE = "trainer.cluster.probe"


@dataclass(frozen=True)
class Failure:
    """How the command on a machine ended before it answered: None where it was given up. said: its last line."""

    status: int | None
    said: str


@dataclass(frozen=True)
class Clock:
    """Seconds by which a machine's clock is ahead of this one's, and by how many that may be wrong."""

    ahead: float
    doubt: float


@dataclass(frozen=True)
class Answer:
    """What came back from one machine.

    unreached: why it cannot connect to the first machine's port; None where it can, or was not asked.
    """

    host: str
    facts: Facts | None = None
    failure: Failure | None = None
    clock: Clock | None = None
    unreached: str | None = None


def ask_all(hosts: Sequence[str], request: Request, limit: float) -> list[Answer]:
    """The answers of hosts over ssh; see `ask`."""
    return ask({host: ssh_command(host, PROBE) for host in hosts}, request, limit)


def ask_here(host: str, request: Request, limit: float) -> Answer:
    """This machine's answer, under a name."""
    (answer,) = ask({host: [sys.executable, "-m", PROBE]}, request, limit)
    return answer


def ask(commands: Mapping[str, Sequence[str]], request: Request, limit: float) -> list[Answer]:
    """The answers of hosts in their order, given the command that starts the probe on each.

    The first host listens at the request's port for as long as the others try to reach it there. What has not answered
    after `limit` seconds is given up.
    """
    allow_many_files()
    probes = [_Probe(host, command) for host, command in commands.items()]
    timer = threading.Timer(limit, lambda: [probe.give_up() for probe in probes])
    timer.start()
    try:
        with ThreadPoolExecutor(len(probes)) as pool:
            first = pool.submit(_examine, probes[0], request)
            quiet = replace(request, port=None)
            others = [pool.submit(_examine_and_connect, probe, quiet, first) for probe in probes[1:]]
            try:
                return [answer.result() for answer in (first, *others)]
            except BaseException:  # a Ctrl-C: the threads would be waited for
                for probe in probes:
                    probe.give_up()
                raise
    finally:
        timer.cancel()
        for probe in probes:
            probe.hang_up()
        for probe in probes:
            probe.close()


class _Probe:
    """trainer.cluster.probe on one machine. `ask` raises _Ended where it has ended, whatever ended it."""

    def __init__(self, host: str, command: Sequence[str]) -> None:
        self.host = host
        self._given_up = False
        self._said = ""
        pipe = subprocess.PIPE  # one for both outputs: hundreds of hosts come near the limit of open files
        self._process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # with what ssh starts itself, as for a ProxyJump
        )

    def ask(self, name: str, **arguments: Any) -> Any:
        with suppress(OSError):  # where it has ended, its output says why
            self._process.stdin.write(json.dumps({name: arguments}) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            answer = parsed(line)
            if isinstance(answer, dict) and name in answer:
                return answer[name]
            self._said = line.strip() or self._said  # a greeting of the shell, or why it ends
        raise _Ended(Failure(None if self._given_up else self._process.wait(), self._said))

    def give_up(self) -> None:
        self._given_up = True
        self._kill()

    def hang_up(self) -> None:
        """Lets it end, by the end of its input."""
        with suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """Waits a little for its end, which is then made."""
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        self._process.stdout.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


class _Ended(Exception):
    def __init__(self, failure: Failure) -> None:
        self.failure = failure


def _examine(probe: _Probe, request: Request) -> Answer:
    try:
        facts = Facts.read(probe.ask("facts", **asdict(request)))
        before = time.time()
        there = probe.ask("clock")
        after = time.time()
    except _Ended as ended:
        return Answer(probe.host, failure=ended.failure)
    except TypeError as error:
        return Answer(probe.host, failure=Failure(0, f"other code of this trainer: {error}"))
    return Answer(probe.host, facts, clock=Clock(there - (before + after) / 2, (after - before) / 2))


def _examine_and_connect(probe: _Probe, request: Request, first: Future[Answer]) -> Answer:
    answer, to = _examine(probe, request), first.result().facts
    if answer.facts is None or to is None or to.port is None:
        return answer
    try:
        unreached = probe.ask("connect", address=to.address, port=to.port, hostname=to.hostname)
    except _Ended:
        unreached = "no answer in time"
    return replace(answer, unreached=unreached and f"{to.address}:{to.port} ({unreached})")
