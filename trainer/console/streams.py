"""Standard output and error that outlast their readers: a terminal, or `| tee log`, may go before the command ends."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def survive_closed_streams() -> Iterator[None]:
    """Within, what is printed and can no longer be written is dropped, and raises nothing.

    A Ctrl-C ends `tee` as well as it asks a run to save; that must not fail by the line that tells of it.
    """
    streams = sys.stdout, sys.stderr
    lasting = sys.stdout, sys.stderr = _SurvivingStream(streams[0]), _SurvivingStream(streams[1])
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()  # at the interpreter's exit that would fail
        sys.stdout, sys.stderr = streams


class _SurvivingStream:
    """A text stream whose writing never fails; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what the stream still holds goes there too
            os.close(nowhere)
