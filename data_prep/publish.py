"""Writes folders and files atomically: they appear complete or not at all, however the process ends."""

import contextlib
import errno
import itertools
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from data_prep.user_error import UserError

_DISK_FAILS = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # as opposed to a file system that lacks an operation
_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.ENOSYS, errno.ENOTSUP)
_NOT_BESIDE = (*_CANNOT_RENAME, errno.EACCES, errno.EPERM, errno.EROFS)  # of a mount point: it is replaced from beside


@contextlib.contextmanager
def publish_atomically(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, which takes its place when the block ends without an error.

    Everything is flushed to disk before a rename makes it visible. Whatever stops the process, `folder` is the old one,
    the new one, or (between two renames, when one is replaced) absent, never a mixture. Also removes what killed
    processes have left. Raises OSError if writing fails, and before the block if `folder` could not be replaced.
    """
    folder = folder.resolve()  # a link to a folder stays a link
    sweep(folder)
    staging, replaced = (_beside(folder, word) for word in ("new", "old"))
    try:
        _make_and_rehearse(staging, folder)
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
        remove_folder(replaced)
    finally:
        remove_folder(staging)


def check_publishable(folder: Path) -> None:
    """Raises the OSError that `publish_atomically` would, ahead of the work that is to be published."""
    folder = folder.resolve()
    staging = _beside(folder, "new")
    try:
        _make_and_rehearse(staging, folder)
    finally:
        remove_folder(staging)


def sweep(folder: Path, locked: bool = False) -> None:
    """Removes what ended processes of this machine have left beside `folder`.

    locked: no other process writes the folder now, so leftovers of any process of this machine are removed.
    """
    folder = folder.resolve()
    ours = re.compile(rf"\.{re.escape(f'{folder.name}.{socket.gethostname()}')}\.(\d+)(-\d+)?\.(new|old)")
    for left, found in ((each, ours.fullmatch(each.name)) for each in folder.parent.glob(".*")):
        if found is None:
            continue
        pid = int(found[1])
        if locked or pid == os.getpid() or not psutil.pid_exists(pid):
            remove_folder(left, quietly=True)


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


def sync_folder(folder: Path) -> None:
    """Syncs renames and new names in a folder. File systems that cannot do that (CIFS, some FUSE) are passed over.

    Raises OSError where the disk itself fails.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in _DISK_FAILS:
            raise


def remove_folder(folder: Path, quietly: bool = False) -> None:
    """Removes a folder that is no longer needed, or a link to one. Warns, unless `quietly`, where that is impossible.

    NFS is the usual reason: it keeps a file that some process has open as .nfsXXXX, and the folder with it.
    """
    try:
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder, ignore_errors=True)  # the first error ended the other attempt
        if os.path.lexists(folder) and not quietly:
            print(f"warning: {folder} could not be removed ({error.strerror or error})", file=sys.stderr, flush=True)


def unused_path(path: Path) -> Path:
    """`path`, or with -2, -3, ... before its ending if that is taken, as by what could not be removed."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not os.path.lexists(each))


@contextlib.contextmanager
def blame_option(option: str, folder: Path) -> Iterator[None]:
    """Turns an OSError about `folder` into a UserError that names the option that gave the folder."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(folder.resolve().parent):
            raise  # about another file, such as one that is read
        remedy = "give a folder that can be written"
        if error.errno in _NOT_BESIDE and _is_mount_point(folder):
            remedy = f"it is a mount point, which cannot be replaced; give a folder in it, such as {folder / 'new'}"
        raise UserError(f"{option}: cannot write {folder} ({error.strerror or error}); {remedy}") from error


def _beside(folder: Path, word: str) -> Path:
    return unused_path(folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.{word}"))


def _make_and_rehearse(staging: Path, folder: Path) -> None:
    """Makes `staging`, and raises OSError where the renames at the end would: better before the work than after it.

    Object stores rename no folder that holds a file. A mount point, or a folder in a lower layer of a container's
    image, cannot be renamed; to find out, it is renamed to a folder that is not empty, which moves nothing.
    """
    staging.mkdir(parents=True)
    made, renamed = staging / "made", staging / "renamed"
    made.mkdir()
    (made / "file").touch()
    try:
        os.rename(made, renamed)
    except OSError as error:
        text = f"its file system cannot rename folders: {error.strerror}"
        raise OSError(error.errno, text, str(folder)) from error
    try:
        os.rename(folder, renamed)
    except OSError as error:
        if error.errno in _CANNOT_RENAME:
            raise OSError(error.errno, f"it cannot be renamed: {error.strerror}", str(folder)) from error
    else:
        os.rename(renamed, folder)  # a file system that replaces folders that are not empty
    remove_folder(renamed, quietly=True)


def _is_mount_point(folder: Path) -> bool:
    """Also of a bind mount within one file system, which os.path.ismount does not see."""
    return str(folder.resolve()) in {each.mountpoint for each in psutil.disk_partitions(all=True)}


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
