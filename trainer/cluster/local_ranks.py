"""The ranks of a launch on this machine, under DeepSpeed's launcher: forwards signals and bounds the time to the end.

DeepSpeed's launcher does neither. It answers a signal by ending the ranks one after the other, returns 1 whatever they
return, and waits forever for a suspended rank.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from data_prep.resource_limits import oom_kills
from data_prep.user_error import UserError
from trainer.cluster.launch_outcome import KILLED, OUT_OF_MEMORY, Outcome, RankEnding, outcome
from trainer.run.crash import crash_ending, crash_stacks
from trainer.run.gpu import gpus_are_usable, visible_gpus
from trainer.run.launch_protocol import ENDINGS, FAULT, Ending, read_endings

HUNG = "did not end in time, and was killed"
SUSPENDED = "was suspended (SIGSTOP or a debugger), and was killed"

_T = TypeVar("_T")


def launcher_command(
    slots: Mapping[str, Sequence[int | str]], node: int, address: str, port: int, arguments: Sequence[str]
) -> list[str]:
    """The command of DeepSpeed's per-node launcher for the node at index `node` of `slots`.

    slots: {node: device ids, one per rank}. address, port: where ranks meet rank 0. arguments: the script and its own.
    """
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    place = [f"--node_rank={node}", f"--master_addr={address}", f"--master_port={port}", "--log_level=warning"]
    return [*launcher, *place, *arguments]


def slots_here(count: int | None) -> list[int | str]:
    """Ids of the first `count` GPUs of this machine, None for all; without a GPU, `count` ranks on the CPU or one.

    Respects CUDA_VISIBLE_DEVICES. An id of -1 is a rank on the CPU: DeepSpeed's launcher then hides all GPUs. Raises
    UserError if there are fewer GPUs, or torch cannot use them.
    """
    ids = visible_gpus()
    if ids is None:
        import torch  # takes seconds

        ids = list(range(torch.cuda.device_count())) if gpus_are_usable() else []
    if not ids:
        return [-1] * (count or 1)
    if count is not None and count > len(ids):
        raise UserError(f"num_gpus={count}: this machine has {len(ids)}; lower it, or see CUDA_VISIBLE_DEVICES")
    return ids[:count]


class LocalRanks:
    """One start of ranks, in a session of their own, so that they are found even after their parents end.

    command: from `launcher_command`. grace: seconds that the others have to end once a rank or the launcher has failed.
    options: subprocess.Popen's.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], grace: float, **options: Any) -> None:
        self._grace = grace
        self._folder = tempfile.TemporaryDirectory(prefix="teamlora-")
        env = {**environment, ENDINGS: self._folder.name}
        self.launcher: subprocess.Popen[str] = subprocess.Popen(command, start_new_session=True, env=env, **options)
        self._ranks: dict[int, psutil.Process] = {}
        self._oom_kills = oom_kills()
        self._suspended: set[int] = set()  # ranks that were so when last looked at
        self._endings: dict[int, RankEnding] = {}  # in the order in which ranks ended
        self._stop_signal: signal.Signals | None = None  # for every rank
        self._stop_requested = False  # from outside
        self._signalled: set[int] = set()  # processes that have got the signal
        self._kill_at = float("inf")  # time.monotonic at which what is left is killed
        self._launcher_outlived_ranks = False  # and was killed for it

    def request_stop(self, number: signal.Signals) -> None:
        """Sends the signal to every rank, also to ones yet to start: they save and end. The first signal counts."""
        self._stop_signal, self._stop_requested = self._stop_signal or number, True

    def kill_after(self, seconds: float) -> None:
        """Kills what is left after so many seconds, or earlier if that was requested before."""
        self._kill_at = min(self._kill_at, time.monotonic() + seconds)

    def poll(self) -> bool:
        """Returns whether any process is left. Also does the supervision, so it must be called often."""
        states = dict(self._processes())
        processes = list(states)
        self._record_endings(processes)
        self._suspended = {rank for rank, each in self._ranks.items() if states.get(each) == psutil.STATUS_STOPPED}
        status = self.launcher.poll()
        if status is not None and status < 0 and not self._kill_due:  # it was killed alone, and its ranks do not know
            self._stop_signal = self._stop_signal or signal.SIGTERM
        if status is not None or any(rank.ending.status != 0 for rank in self._endings.values()):
            self.kill_after(self._grace)
        if self._kill_due:
            self._kill(processes)
        elif self._stop_signal is not None:
            self._send_to_ranks(self._stop_signal)
        return bool(processes) or status is None

    @property
    def _kill_due(self) -> bool:
        return time.monotonic() >= self._kill_at

    def endings(self) -> list[RankEnding]:
        """How each rank ended, in the order in which they ended."""
        return list(self._endings.values())

    def outcome(self) -> Outcome:
        """The outcome once nothing is left; deletes the folder of the ranks' endings."""
        self._folder.cleanup()
        return outcome([("", ending) for ending in self.endings()], [self.launcher_status], self._stop_requested)

    @property
    def launcher_status(self) -> int:
        """Of DeepSpeed's launcher, once nothing is left; 0 where it did not end with its ranks: theirs counts."""
        return 0 if self._launcher_outlived_ranks else self.launcher.returncode

    def _record_endings(self, processes: Sequence[psutil.Process]) -> None:
        """Finds new ranks, and how those ended whose process is gone."""
        for process in processes:
            rank = _rank_of(process)
            if rank is not None:
                self._ranks.setdefault(rank, process)
        running = {process.pid for process in processes}
        gone = [rank for rank, each in self._ranks.items() if each.pid not in running and rank not in self._endings]
        written = read_endings(Path(self._folder.name))  # after listing processes: ranks write before they exit
        for rank, ending in written.items():
            self._endings.setdefault(rank, RankEnding(rank, ending))
        for rank in gone:
            if rank not in self._endings:
                self._endings[rank] = self._ending_of(rank)

    def _ending_of(self, rank: int) -> RankEnding:
        """The ending of a rank that is gone and has written none. Prints the stacks that it left, if it crashed."""
        stacks = crash_stacks(Path(self._folder.name), rank)
        if stacks:
            print(f"rank {rank} crashed:\n{stacks}", file=sys.stderr, flush=True)
            return RankEnding(rank, crash_ending(stacks))
        if rank in self._suspended:  # DeepSpeed's launcher has killed it half a minute after another rank's end
            return RankEnding(rank, Ending(FAULT, SUSPENDED), stuck=True)
        return RankEnding(rank, Ending(FAULT, OUT_OF_MEMORY if oom_kills() > self._oom_kills else KILLED))

    def _send_to_ranks(self, number: signal.Signals) -> None:
        for process in self._ranks.values():
            if process.pid not in self._signalled:
                self._signalled.add(process.pid)
                _if_alive(process, lambda process: process.send_signal(number))

    def _kill(self, processes: Sequence[psutil.Process]) -> None:
        if self.launcher.poll() is None and self._ranks and self._ranks.keys() <= self._endings.keys():
            self._launcher_outlived_ranks = True
        for rank, process in self._ranks.items():
            if process in processes and rank not in self._endings:
                line = SUSPENDED if rank in self._suspended else HUNG
                self._endings[rank] = RankEnding(rank, Ending(FAULT, line), stuck=True)
        for process in processes:
            _if_alive(process, psutil.Process.kill)

    def _processes(self) -> Iterator[tuple[psutil.Process, str]]:
        """Each process of the session that has not ended, and its state."""
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.launcher.pid and (state := process.status()) != psutil.STATUS_ZOMBIE:
                    yield process, state
            except (OSError, psutil.Error):
                continue


def _rank_of(process: psutil.Process) -> int | None:
    """The rank of a rank's main process; None for the launcher and for a rank's children, which inherit RANK."""
    try:
        rank, parent = process.environ().get("RANK"), process.parent()
        inherited = parent is not None and "RANK" in parent.environ()
    except psutil.Error:  # it has ended, or is about to start
        return None
    return int(rank) if rank is not None and not inherited else None


def _if_alive(process: psutil.Process, action: Callable[[psutil.Process], _T]) -> _T | None:
    """Returns the action's result; None if the process has ended."""
    try:
        return action(process)
    except psutil.Error:
        return None
