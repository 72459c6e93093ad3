"""The folder of a checkpoint: it appears whole or not at all, is found again, and is verified before it is used.

checkpoints/step-000123/    state-00001.safetensors ..., run.json, and index.json with every file's sha256
checkpoints/latest, best    names of folders, for users and scripts
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.publish import check_publishable, remove_folder, sync_folder, unused_path, write_atomically
from data_prep.user_path import is_file_name

INDEX = "index.json"
LATEST, BEST = "latest", "best"
PARTIAL, OLD = ".partial", ".old"  # endings of hidden folders, of a save and of a removal
_FOLDER = re.compile(r"step-(\d{6,})")


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def check_folder(checkpoints: Path) -> None:
    """Raises the OSError that publishing would, where the folder is there already: it may be a link to another disk."""
    if os.path.lexists(checkpoints):
        check_publishable(checkpoints / folder_name(0))


class CheckpointWriter:
    """Writes one checkpoint. Before `publish` nobody takes the files for a checkpoint, whenever the process ends."""

    def __init__(self, checkpoints: Path, step: int) -> None:
        self._final = checkpoints / folder_name(step)
        self._files: dict[str, dict[str, Any]] = {}
        staging = checkpoints / f".{self._final.name}{PARTIAL}"
        remove_folder(staging, quietly=True)
        self._staging = unused_path(staging)
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
        sync_folder(self._staging)
        replaced = None
        if os.path.lexists(self._final):  # the run went back behind this step, and has come to it again
            replaced = _set_aside(self._final)
        self._staging.rename(self._final)
        point(self._final.parent, LATEST, self._final.name)
        if replaced is not None:
            remove_folder(replaced)
        return self._final

    def discard(self) -> None:
        remove_folder(self._staging)


def point(checkpoints: Path, pointer: str, name: str) -> None:
    """Sets `latest` or `best` to a folder's name, atomically."""
    write_atomically(checkpoints / pointer, f"{name}\n", sync=True)
    sync_folder(checkpoints)


def read_pointer(checkpoints: Path, pointer: str) -> int | None:
    """The step of the folder that `latest` or `best` names; None without a pointer that can be read.

    It may be a link to the folder. A damaged one is as good as none: the next save writes it anew.
    """
    path = checkpoints / pointer
    try:
        match = _FOLDER.fullmatch(
            path.readlink().name if path.is_symlink() else path.read_text(encoding="utf-8").strip()
        )
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) if match else None


def steps_in(checkpoints: Path) -> list[int]:
    """Steps of the published checkpoints, ascending. Links to folders count, also those that lead nowhere just now."""
    if not checkpoints.is_dir():
        return []
    found = (_FOLDER.fullmatch(path.name) for path in checkpoints.iterdir() if path.is_dir() or path.is_symlink())
    return sorted(int(match[1]) for match in found if match)


def tensor_files(checkpoint: Path) -> list[Path]:
    """Its safetensors files as the index lists them; others beside them, such as copies, are not part of it."""
    index = json.loads((checkpoint / INDEX).read_text(encoding="utf-8"))
    return [checkpoint / name for name in index["files"] if name.endswith(".safetensors")]


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where each one is as its index says."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = index["files"]
        if index["sha256"] != _digest(files):
            return f"{INDEX} is damaged"
        for name, known in files.items():
            if not is_file_name(name):
                return f"{INDEX} names {name!r}, where files of its folder are expected"
            content = folder / name
            if not content.is_file():
                return f"{name} is missing"
            if content.stat().st_size != known["bytes"]:
                return f"{name} has {content.stat().st_size} bytes instead of {known['bytes']}"
            with content.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != known["sha256"]:
                    return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON of any shape
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

    What cannot be removed is named in a warning, and tried again after the next save: the save itself is done.
    step: of the checkpoint that was just saved. Later ones stay: they were damaged, and the run resumed before them.
    """
    steps = [each for each in steps_in(checkpoints) if each <= step]
    kept = {*steps[-keep_last:], *keep, *(s for s in steps if keep_every and s % keep_every == 0)}
    sweep(checkpoints, (OLD,))
    for step in sorted(set(steps) - kept):
        folder = checkpoints / folder_name(step)
        try:
            doomed = _set_aside(folder)
        except OSError as error:
            print(f"warning: {folder} could not be removed ({error.strerror or error})", file=sys.stderr, flush=True)
        else:
            remove_folder(doomed)


def sweep(checkpoints: Path, endings: Iterable[str] = (PARTIAL, OLD)) -> None:
    """Removes what interrupted saves and removals left behind, where it can."""
    for ending in endings:
        for path in checkpoints.glob(f".step-*{ending}"):
            remove_folder(path, quietly=True)


def _set_aside(folder: Path) -> Path:
    """Renames a checkpoint that is to be removed, so that no half of it is ever taken for one."""
    doomed = unused_path(folder.with_name(f".{folder.name}{OLD}"))
    folder.rename(doomed)
    return doomed


def _digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
