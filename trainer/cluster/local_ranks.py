"""The ranks of a launch on this machine, under DeepSpeed's launcher: signals handed on, and an end within a bound.

DeepSpeed's launcher does neither: it answers a signal by ending the ranks one after the other, returns 1 whatever they
return, and waits for ever for a rank that is halted.
"""

import base64
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from data_prep.user_error import UserError
from trainer.cluster.launch_outcome import KILLED, Outcome, RankEnding, outcome
from trainer.run.launch_protocol import ENDINGS, FAULT, Ending, read_endings

HUNG = "neither ended nor answered, and was killed"
HALTED = "was halted, as by SIGSTOP or a debugger, and was killed"


def launcher_command(
    slots: Mapping[str, Sequence[int | str]], node: int, address: str, port: int, arguments: Sequence[str]
) -> list[str]:
    """What DeepSpeed's own launchers start on each node, here on the one that is number `node` in `slots`.

    slots: {node: ids of its devices, one a rank}. address, port: where rank 0 is met. arguments: script and its own.
    """
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    place = [f"--node_rank={node}", f"--master_addr={address}", f"--master_port={port}", "--log_level=warning"]
    return [*launcher, *place, *arguments]


def visible_gpus() -> list[int | str] | None:
    """Ids that CUDA_VISIBLE_DEVICES names, up to a -1 or an empty one, as CUDA reads it; None where it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    names = itertools.takewhile(lambda name: name not in ("-1", ""), map(str.strip, visible.split(",")))
    return [int(name) if name.isdecimal() else name for name in names]


def slots_here(count: int | None) -> list[int | str]:
    """Ids of this machine's GPUs that are to be used, `count` of them; without a GPU `count` ranks on the CPU, or one.

    CUDA_VISIBLE_DEVICES is kept to; for ranks on the CPU DeepSpeed's launcher makes -1 of it, and so hides what GPUs
    there are. Raises UserError where there are fewer.
    """
    ids = visible_gpus()
    if ids is None:
        import torch  # takes seconds

        ids = list(range(torch.cuda.device_count()))
    if not ids:
        return [-1] * (count or 1)
    if count is not None and count > len(ids):
        raise UserError(f"num_gpus={count}: {len(ids)} are here; lower it, or see CUDA_VISIBLE_DEVICES")
    return ids[:count]


class LocalRanks:
    """One start of ranks, in a session of its own: so they are found however their parents end.

    command: as `launcher_command` gives it. grace: seconds that the others have when a rank, or the launcher,
    has failed. Further options are subprocess.Popen's.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], grace: float, **options: Any) -> None:
        self._grace = grace
        self._folder = tempfile.TemporaryDirectory(prefix="teamlora-")
        env = {**environment, ENDINGS: self._folder.name}
        self.launcher = subprocess.Popen(command, start_new_session=True, env=env, **options)
        self._ranks: dict[int, psutil.Process] = {}
        self._seen: dict[int, RankEnding] = {}  # in the order in which they ended
        self._asked: signal.Signals | None = None
        self._stopping = False  # asked from outside
        self._told: set[int] = set()  # processes that have been told
        self._ending = float("inf")  # when what is left is killed, by time.monotonic

    def ask(self, number: signal.Signals) -> None:
        """Has every rank asked to save and end, now or as soon as it has begun."""
        self._asked, self._stopping = self._asked or number, True

    def end_within(self, seconds: float) -> None:
        """Kills what is left after so many seconds."""
        self._ending = min(self._ending, time.monotonic() + seconds)

    def look(self) -> bool:
        """Whether anything of the launch is left. To be called often: here it is seen to."""
        left = list(self._processes())
        self._note(left)
        status = self.launcher.poll()
        if status is not None and status < 0 and not self._killing:  # it was ended itself; its ranks do not know
            self._asked = self._asked or signal.SIGTERM
        if status is not None or any(found.ending.status != 0 for found in self._seen.values()):
            self.end_within(self._grace)
        if self._killing:
            self._kill(left)
        elif self._asked is not None:
            self._hand_on()
        return bool(left) or status is None

    @property
    def _killing(self) -> bool:
        return time.monotonic() >= self._ending

    def endings(self) -> list[RankEnding]:
        """How each rank ended, in that order."""
        return list(self._seen.values())

    def outcome(self) -> Outcome:
        """What became of them, once nothing is left; their folder goes."""
        self._folder.cleanup()
        found = [("", ending) for ending in self.endings()]
        return outcome(found, [self.launcher.returncode], stopping=self._stopping)

    def _note(self, left: Sequence[psutil.Process]) -> None:
        """Which ranks there are, and how those ended that are gone."""
        for process in left:
            rank = _rank_of(process)
            if rank is not None:
                self._ranks.setdefault(rank, process)
        running = {process.pid for process in left}
        gone = [rank for rank, process in self._ranks.items() if process.pid not in running and rank not in self._seen]
        told = read_endings(Path(self._folder.name))  # after looking who is gone: they write before they go
        for rank, ending in (told | {rank: Ending(FAULT, KILLED) for rank in gone if rank not in told}).items():
            self._seen.setdefault(rank, RankEnding(rank, ending))

    def _hand_on(self) -> None:
        for process in self._ranks.values():
            if process.pid not in self._told:
                self._told.add(process.pid)
                _to_living(process, lambda process: process.send_signal(self._asked))

    def _kill(self, left: Sequence[psutil.Process]) -> None:
        for rank, process in self._ranks.items():
            if process in left and rank not in self._seen:
                halted = _to_living(process, psutil.Process.status) == psutil.STATUS_STOPPED
                self._seen[rank] = RankEnding(rank, Ending(FAULT, HALTED if halted else HUNG), stuck=True)
        for process in left:
            _to_living(process, psutil.Process.kill)

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                mine = os.getsid(process.pid) == self.launcher.pid
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except (OSError, psutil.Error):
                continue


def _rank_of(process: psutil.Process) -> int | None:
    """The number of a rank's own process; None for the launcher, and for a rank's children, which inherit RANK."""
    try:
        rank, parent = process.environ().get("RANK"), process.parent()
        inherited = parent is not None and "RANK" in parent.environ()
    except psutil.Error:  # it has ended, or is about to begin
        return None
    return int(rank) if rank is not None and not inherited else None


def _to_living(process: psutil.Process, deed: Any) -> Any:
    try:
        return deed(process)
    except psutil.Error:  # it has ended
        return None
