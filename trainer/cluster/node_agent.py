"""Runs a launch's ranks on one node: `python -m trainer.cluster.node_agent SILENCE GRACE`, started by remote_ranks.py.

Both sides write JSON objects, one per line. The launching host sends {"start": ...} once, {"stop": signal},
{"kill_after": seconds}, and {} every second. The agent sends {"hello": ...}, {"out": line} and {"err": line} of the
ranks, {} every second, and {"ended": ...} last. A side that hears nothing for SILENCE seconds takes the other for lost:
the ranks then save and end if they can, and are killed if they cannot.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import IO, Any

from trainer.cluster.local_ranks import LocalRanks
from trainer.distributed.network import free_port, reached_at

POLL_EVERY = 0.2  # seconds
HEARTBEAT_EVERY = 1.0  # seconds


class LauncherConnection:
    """The connection to the launching host, over stdin and stdout. Neither sending nor receiving blocks."""

    def __init__(self, silence: float) -> None:
        self._silence = silence
        self._last_heard, self._last_heartbeat = time.monotonic(), 0.0
        self._closed = False
        self._in: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._out: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    @property
    def lost(self) -> bool:
        """Whether the launching host has closed the connection, or has been silent for too long."""
        return self._closed or time.monotonic() - self._last_heard > self._silence

    def send(self, **message: Any) -> None:
        self._out.put(message)

    def receive(self) -> Iterator[dict[str, Any]]:
        """Messages that have come since the last call. Also sends the heartbeat."""
        if time.monotonic() - self._last_heartbeat > HEARTBEAT_EVERY:
            self._last_heartbeat = time.monotonic()
            self.send()
        while not self._in.empty():
            yield self._in.get()

    def close(self) -> None:
        """Waits up to `silence` seconds until everything is written."""
        self._out.put(None)
        self._writer.join(self._silence)

    def _read(self) -> None:
        try:
            for line in sys.stdin:
                self._last_heard = time.monotonic()
                self._in.put(json.loads(line))
        finally:  # also after a line that was cut off
            self._closed = True

    def _write(self) -> None:
        while (message := self._out.get()) is not None:
            try:
                print(json.dumps(message), flush=True)
            except OSError:  # the launching host is gone
                return


def serve(connection: LauncherConnection, grace: float, silence: float) -> None:
    """Says hello, runs the requested ranks, and reports how they ended."""
    connection.send(hello={"address": reached_at(), "port": free_port()})
    start = _wait_for_start(connection)
    if start is None:
        return
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    ranks = LocalRanks(start["command"], {**os.environ, **start["environment"]}, grace, cwd=start["folder"], **pipes)
    stdout, stderr = ranks.launcher.stdout, ranks.launcher.stderr
    assert stdout is not None and stderr is not None
    readers = [
        threading.Thread(target=_forward_lines, args=(pipe, name, connection), daemon=True)
        for pipe, name in ((stdout, "out"), (stderr, "err"))
    ]
    for reader in readers:
        reader.start()
    while ranks.poll():
        for message in connection.receive():
            if "stop" in message:
                ranks.request_stop(signal.Signals(message["stop"]))
            if "kill_after" in message:
                ranks.kill_after(message["kill_after"])
        if connection.lost:
            ranks.request_stop(signal.SIGTERM)
            ranks.kill_after(silence + grace)
        time.sleep(POLL_EVERY)
    for reader in readers:
        reader.join(grace)
    ranks.outcome()
    endings = [asdict(ending) for ending in ranks.endings()]
    connection.send(ended={"launcher": ranks.launcher_status, "ranks": endings})


def _wait_for_start(connection: LauncherConnection) -> dict[str, Any] | None:
    """The request to start ranks; None if the launching host goes away instead."""
    while not connection.lost:
        for message in connection.receive():
            if "start" in message:
                return message["start"]
        time.sleep(POLL_EVERY / 4)
    return None


def _forward_lines(pipe: IO[str], name: str, connection: LauncherConnection) -> None:
    for line in pipe:
        connection.send(**{name: line.rstrip("\n")})


def main() -> None:
    silence, grace = map(float, sys.argv[1:])
    connection = LauncherConnection(silence)
    serve(connection, grace, silence)
    connection.close()
    os._exit(0)  # without waiting for the reading thread, which may wait for input forever


if __name__ == "__main__":
    main()
