"""Standard streams that survive their reader: a terminal or `| tee log` may end before the command does."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def survive_closed_streams() -> Iterator[None]:
    """Within this context, output that can no longer be written is dropped instead of raising.

    Ctrl-C ends `tee` too while the run is saving: printing a line must not make the save fail. Characters that a
    stream's encoding lacks are written as escapes.
    """
    streams = sys.stdout, sys.stderr
    lasting = sys.stdout, sys.stderr = _SurvivingStream(streams[0]), _SurvivingStream(streams[1])
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()  # would raise at interpreter exit
        sys.stdout, sys.stderr = streams


class _SurvivingStream:
    """A text stream whose writes never raise; everything else is delegated."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

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
            os.dup2(nowhere, self._stream.fileno())  # buffered output goes there too
            os.close(nowhere)
