"""Unpacks .bz2 and .xz to the end of the file. Python's own readers stop in silence at a member that is damaged."""

import bz2
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHUNK = 2**16  # bytes
_XZ_MEMORY = 2**29  # bytes; `xz -9` needs 65 MiB to unpack, and a header may ask for 4 GiB


class _Members(io.RawIOBase):
    """The members of a compressed file, one after the other, as one stream."""

    def __init__(self, path: Path, decompressor: Callable[[], Any]) -> None:
        self._file, self._make = path.open("rb"), decompressor
        self._member = decompressor()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Raises OSError or LZMAError for what is no member, and EOFError within one that is cut short."""
        while True:
            packed = self._next_input()
            if packed is None:
                return 0
            if unpacked := self._member.decompress(packed, len(buffer)):
                buffer[: len(unpacked)] = unpacked
                return len(unpacked)

    def _next_input(self) -> bytes | None:
        """What the member is to be fed, perhaps nothing; a new member where one has ended; None after the last."""
        if not self._member.eof:
            packed = self._file.read(_CHUNK) if self._member.needs_input else b""
            if self._member.needs_input and not packed:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            return packed
        packed = self._member.unused_data.lstrip(b"\0")  # padding, which .xz may have between members
        while not packed:
            if not (packed := self._file.read(_CHUNK)):
                return None
            packed = packed.lstrip(b"\0")
        self._member = self._make()
        return packed


def open_bz2(path: Path) -> io.RawIOBase:
    return _Members(path, bz2.BZ2Decompressor)


def open_xz(path: Path) -> io.RawIOBase:
    return _Members(path, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY))
