"""The folder of a checkpoint: it appears whole or not at all, is found again, and is verified before it is used.

checkpoints/step-000123/    state-00001.safetensors ..., run.json, and index.json with every file's sha256
checkpoints/latest, best    names of folders, for users and scripts
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.publish import write_atomically

INDEX = "index.json"
LATEST, BEST = "latest", "best"
_FOLDER = re.compile(r"step-(\d{6,})")


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


class CheckpointWriter:
    """Writes one checkpoint. Before `publish` nobody takes the files for a checkpoint, whenever the process ends."""

    def __init__(self, checkpoints: Path, step: int) -> None:
        self._final = checkpoints / folder_name(step)
        self._staging = checkpoints / f".{self._final.name}.partial"
        self._files: dict[str, dict[str, Any]] = {}
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)

    def add(self, name: str, content: bytes) -> None:
        """Writes and syncs a file. Raises OSError."""
        _write(self._staging / name, content)
        self._files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def publish(self) -> Path:
        """Reads everything back, renames the folder, and sets `latest` last.

        Raises OSError, also where the files do not hold what was written.
        """
        index = {"files": self._files, "sha256": _digest(self._files)}
        _write(self._staging / INDEX, json.dumps(index, indent=1).encode())
        if problem := verify(self._staging):
            raise OSError(f"{self._staging}: {problem} right after it was written")
        _sync(self._staging)
        if self._final.exists():  # the run went back behind this step, and has come to it again
            shutil.rmtree(self._final)
        self._staging.rename(self._final)
        point(self._final.parent, LATEST, self._final.name)
        return self._final

    def discard(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)


def point(checkpoints: Path, pointer: str, name: str) -> None:
    """Sets `latest` or `best` to a folder's name, atomically."""
    write_atomically(checkpoints / pointer, f"{name}\n", sync=True)
    _sync(checkpoints)


def read_pointer(checkpoints: Path, pointer: str) -> int | None:
    """The step of the folder that `latest` or `best` names; None without a pointer."""
    try:
        match = _FOLDER.fullmatch((checkpoints / pointer).read_text().strip())
    except FileNotFoundError:
        return None
    return int(match[1]) if match else None


def steps_in(checkpoints: Path) -> list[int]:
    """Steps of the published checkpoints, ascending."""
    if not checkpoints.is_dir():
        return []
    found = (_FOLDER.fullmatch(path.name) for path in checkpoints.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where each one is as its index says."""
    try:
        index = json.loads((folder / INDEX).read_text())
        files = index["files"]
        if index["sha256"] != _digest(files):
            return f"{INDEX} is damaged"
        for name, known in files.items():
            content = folder / name
            if not content.is_file():
                return f"{name} is missing"
            if content.stat().st_size != known["bytes"]:
                return f"{name} has {content.stat().st_size} bytes instead of {known['bytes']}"
            with content.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != known["sha256"]:
                    return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{INDEX} cannot be read ({error})"
    return None


def newest_intact(checkpoints: Path) -> Iterator[tuple[Path, str | None]]:
    """(folder, what is wrong with it) from the newest backward; ends with the first intact one, if there is any."""
    for step in reversed(steps_in(checkpoints)):
        folder = checkpoints / folder_name(step)
        problem = verify(folder)
        yield folder, problem
        if problem is None:
            return


def prune(checkpoints: Path, step: int, keep_last: int, keep_every: int | None, keep: Iterable[int]) -> None:
    """Removes all except the newest `keep_last` up to `step`, the multiples of `keep_every` and those in `keep`.

    step: of the checkpoint that was just saved. Later ones stay: they were damaged, and the run resumed before them.
    """
    steps = [each for each in steps_in(checkpoints) if each <= step]
    kept = {*steps[-keep_last:], *keep, *(s for s in steps if keep_every and s % keep_every == 0)}
    for step in set(steps) - kept:
        folder = checkpoints / folder_name(step)
        doomed = (
            checkpoints / f".{folder.name}.old"
        )  # renamed first, so that no half of it is ever taken for a checkpoint
        folder.rename(doomed)
        shutil.rmtree(doomed)


def sweep(checkpoints: Path) -> None:
    """Removes what interrupted saves and removals left behind."""
    for pattern in (".step-*.partial", ".step-*.old"):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Syncs renames and new names in a folder; some file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
