"""A launch's end on one node: `python -m trainer.cluster.node_agent SILENCE GRACE`, started by remote_ranks.py.

Both ends write JSON objects, one a line. The launching host: {"begin": ...} once, {"ask": signal}, {"end_within":
seconds}, and {} each second. The agent: {"hello": ...}, {"out": line} and {"err": line} of the ranks, {} each second,
and {"ended": ...} last. An end that hears nothing for SILENCE seconds takes the other for lost: the ranks then save and
end if they can, and are killed if they cannot.
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

LOOK_EVERY = 0.2  # seconds
BEAT_EVERY = 1.0  # seconds


class Line:
    """The connection to the launching host. It neither waits for what that says nor for what it takes."""

    def __init__(self, silence: float) -> None:
        self._silence = silence
        self._heard, self._beat = time.monotonic(), 0.0
        self._closed = False
        self._in: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._out: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    @property
    def lost(self) -> bool:
        """Whether the other end has closed the connection, or said nothing for too long."""
        return self._closed or time.monotonic() - self._heard > self._silence

    def say(self, **message: Any) -> None:
        self._out.put(message)

    def heard(self) -> Iterator[dict[str, Any]]:
        """What has come since the last call. It is also told that this end lives."""
        if time.monotonic() - self._beat > BEAT_EVERY:
            self._beat = time.monotonic()
            self.say()
        while not self._in.empty():
            yield self._in.get()

    def close(self) -> None:
        """Waits until all is written, where it is taken."""
        self._out.put(None)
        self._writer.join(self._silence)

    def _read(self) -> None:
        try:
            for line in sys.stdin:
                self._heard = time.monotonic()
                self._in.put(json.loads(line))
        finally:  # also after a line that was cut off
            self._closed = True

    def _write(self) -> None:
        while (message := self._out.get()) is not None:
            try:
                print(json.dumps(message), flush=True)
            except OSError:  # nobody listens
                return


def serve(line: Line, grace: float, silence: float) -> None:
    """Says hello, runs the ranks that it is asked to, and tells how they ended."""
    line.say(hello={"address": reached_at(), "port": free_port()})
    begin = _first_request(line)
    if begin is None:
        return
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    ranks = LocalRanks(begin["command"], {**os.environ, **begin["environment"]}, grace, cwd=begin["folder"], **pipes)
    readers = [
        threading.Thread(target=_pass_on, args=(pipe, name, line), daemon=True)
        for pipe, name in ((ranks.launcher.stdout, "out"), (ranks.launcher.stderr, "err"))
    ]
    for reader in readers:
        reader.start()
    while ranks.look():
        for message in line.heard():
            if "ask" in message:
                ranks.ask(signal.Signals(message["ask"]))
            if "end_within" in message:
                ranks.end_within(message["end_within"])
        if line.lost:
            ranks.ask(signal.SIGTERM)
            ranks.end_within(silence + grace)
        time.sleep(LOOK_EVERY)
    for reader in readers:
        reader.join(grace)
    ranks.outcome()
    line.say(ended={"launcher": ranks.launcher.returncode, "ranks": [asdict(found) for found in ranks.endings()]})


def _first_request(line: Line) -> dict[str, Any] | None:
    """The order to begin; None where the other end goes instead."""
    while not line.lost:
        for message in line.heard():
            if "begin" in message:
                return message["begin"]
        time.sleep(LOOK_EVERY / 4)
    return None


def _pass_on(pipe: IO[str], name: str, line: Line) -> None:
    for text in pipe:
        line.say(**{name: text.rstrip("\n")})


def main() -> None:
    silence, grace = map(float, sys.argv[1:])
    line = Line(silence)
    serve(line, grace, silence)
    line.close()
    os._exit(0)  # without waiting for the thread that reads: nothing more may come


if __name__ == "__main__":
    main()
