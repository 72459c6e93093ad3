"""Runs the probe on many machines at once: one ssh and one thread per machine."""

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
from trainer.cluster.ssh import allow_many_files, parse_json, ssh_command
from trainer.run.resources import PACKAGE_ROOT

PROBE = "trainer.cluster.probe"


@dataclass(frozen=True)
class Failure:
    """A probe that ended before it answered. status: None if it was given up. last_line: of its output."""

    status: int | None
    last_line: str


@dataclass(frozen=True)
class ClockOffset:
    """Seconds by which a machine's clock is ahead of this one's, and how far off that number may be."""

    ahead: float
    uncertainty: float


@dataclass(frozen=True)
class Answer:
    """The result from one machine.

    unreachable: why it cannot connect to the first machine's port; None if it can or did not try.
    """

    host: str
    facts: Facts | None = None
    failure: Failure | None = None
    clock: ClockOffset | None = None
    unreachable: str | None = None


def probe_hosts(hosts: Sequence[str], request: Request, limit: float) -> list[Answer]:
    """Probes hosts over ssh; see `probe_all`."""
    return probe_all({host: ssh_command(host, PROBE) for host in hosts}, request, limit)


def probe_this_machine(host: str, request: Request, limit: float) -> Answer:
    """Probes this machine without ssh. host: the name in its answer."""
    (answer,) = probe_all({host: [sys.executable, "-m", PROBE]}, request, limit)
    return answer


def probe_all(commands: Mapping[str, Sequence[str]], request: Request, limit: float) -> list[Answer]:
    """Returns the answers in the hosts' order. commands: {host: the command that starts the probe there}.

    The first host listens at the request's port while the others try to reach it there. Hosts that have not answered
    after `limit` seconds are given up.
    """
    allow_many_files()
    probes = [_Probe(host, command) for host, command in commands.items()]
    timer = threading.Timer(limit, _give_up, args=[probes])
    timer.start()
    try:
        with ThreadPoolExecutor(len(probes)) as pool:
            first = pool.submit(_examine, probes[0], request)
            without_port = replace(request, port=None)
            others = [pool.submit(_examine_and_connect, probe, without_port, first) for probe in probes[1:]]
            try:
                return [answer.result() for answer in (first, *others)]
            except BaseException:  # a Ctrl-C: leaving the block waits for the threads
                _give_up(probes)
                raise
    finally:
        timer.cancel()
        for probe in probes:
            probe.close_input()
        for probe in probes:
            probe.close()


class _Probe:
    """The probe's process on one machine."""

    def __init__(self, host: str, command: Sequence[str]) -> None:
        self.host = host
        self._given_up = False
        self._last_line = ""
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command,
            cwd=PACKAGE_ROOT,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT,  # one pipe for both: hundreds of hosts come near the limit of open files
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # with what ssh itself starts, as for a ProxyJump
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def call(self, name: str, **arguments: Any) -> Any:
        """Calls a function of the probe. Raises _ProbeEnded if the process has ended for any reason."""
        with suppress(OSError):  # if it has ended, its output gives the reason
            self._stdin.write(json.dumps({name: arguments}) + "\n")
            self._stdin.flush()
        for line in self._stdout:
            answer = parse_json(line)
            if isinstance(answer, dict) and name in answer:
                return answer[name]
            self._last_line = line.strip() or self._last_line  # a shell's greeting, or an error
        raise _ProbeEnded(Failure(None if self._given_up else self._process.wait(), self._last_line))

    def give_up(self) -> None:
        self._given_up = True
        self._kill()

    def close_input(self) -> None:
        """Lets the process end by itself."""
        with suppress(OSError):
            self._stdin.close()

    def close(self) -> None:
        """Waits up to a second for the process to end, then kills it."""
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        self._stdout.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


class _ProbeEnded(Exception):
    def __init__(self, failure: Failure) -> None:
        self.failure = failure


def _give_up(probes: Sequence[_Probe]) -> None:
    for probe in probes:
        probe.give_up()


def _examine(probe: _Probe, request: Request) -> Answer:
    try:
        facts = Facts.from_json(probe.call("facts", **asdict(request)))
        before = time.time()
        there = probe.call("clock")
        after = time.time()
    except _ProbeEnded as ended:
        return Answer(probe.host, failure=ended.failure)
    except TypeError as error:
        return Answer(probe.host, failure=Failure(0, f"other trainer code: {error}"))
    return Answer(probe.host, facts, clock=ClockOffset(there - (before + after) / 2, (after - before) / 2))


def _examine_and_connect(probe: _Probe, request: Request, first: Future[Answer]) -> Answer:
    answer, to = _examine(probe, request), first.result().facts
    if answer.facts is None or to is None or to.port is None:
        return answer
    try:
        reason = probe.call("connect", address=to.address, port=to.port, hostname=to.hostname)
    except _ProbeEnded:
        reason = "no answer in time"
    return replace(answer, unreachable=reason and f"{to.address}:{to.port} ({reason})")
