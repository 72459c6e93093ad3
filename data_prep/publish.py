"""Writes folders and files atomically: they appear complete or not at all, however the process ends."""

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from data_prep.user_error import UserError


@contextlib.contextmanager
def publish_atomically(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, which takes its place when the block ends without an error.

    Everything is flushed to disk before a rename makes it visible. Whatever stops the process, `folder` is the old one,
    the new one, or (between two renames, when one is replaced) absent, never a mixture. Also removes what killed
    processes have left. Raises OSError if writing fails.
    """
    folder = folder.resolve()  # a link to a folder stays a link
    sweep(folder)
    staging, replaced = (_beside(folder, str(os.getpid()), word) for word in ("new", "old"))
    try:
        staging.mkdir(parents=True)
        yield staging
        _flush(staging)
        if folder.exists():
            folder.rename(replaced)
        try:
            staging.rename(folder)
        except OSError:
            with contextlib.suppress(OSError):  # if there was none
                replaced.rename(folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sweep(folder: Path, locked: bool = False) -> None:
    """Removes what ended processes of this machine have left beside `folder`.

    locked: no other process writes the folder now, so leftovers of any process of this machine are removed.
    """
    folder = folder.resolve()
    ours = re.compile(rf"\.{re.escape(f'{folder.name}.{socket.gethostname()}')}\.(\d+)\.(new|old)")
    for left, found in ((each, ours.fullmatch(each.name)) for each in folder.parent.glob(".*")):
        if found is None:
            continue
        pid = int(found[1])
        if locked or pid == os.getpid() or not psutil.pid_exists(pid):
            shutil.rmtree(left, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes, sync: bool = False) -> None:
    """Writes a file under one rename; text in UTF-8. sync: to the disk before the rename.

    Raises OSError where the disk refuses; an older file then stays as it is.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def blame_option(option: str, folder: Path) -> Iterator[None]:
    """Turns an OSError about `folder` into a UserError that names the option that gave the folder."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(folder.resolve().parent):
            raise  # about another file, such as one that is read
        raise UserError(
            f"{option}: cannot write {folder} ({error.strerror or error}); give a folder that can be written"
        ) from error


def _beside(folder: Path, pid: str, word: str) -> Path:
    return folder.with_name(f".{folder.name}.{socket.gethostname()}.{pid}.{word}")


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
