"""The kinds of faults: at which phases each may strike, what it does there, and what must follow.

Imported by every rank before its command begins, so nothing heavy here.
"""

import builtins
import errno
import io
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak.phases import IMPORTS, PROCESSES, RANKS, Fault, Rank
from trainer.run.launch_protocol import FAULT, MISTAKE, STOPPED

RUNS, BALLAST = "runs", "ballast"  # the folder on a small disk of its own, and the file that fills it
ANSWERED = "answered"  # file in the folder of faults, once a second launch has ended
SHARED_MEMORY = Path("/dev/shm")
KILLED = -signal.SIGKILL
BOTH = "both ranks"
WHOLE_RUN = ("load", "restore", "step", "backward", "evaluation", "metrics", "save")
TRAINING = ("step", "backward", "evaluation", "metrics", "save")
ANY_PHASE = (IMPORTS, *WHOLE_RUN, "checks", "save published", "pointer", "prune", "publish", "publish synced")
NOT_ENOUGH_MEMORY = r"killed from outside \(SIGKILL, or out of memory\)|another rank has ended|killed from outside"


@dataclass(frozen=True)
class Kind:
    """act: done in the rank. ends: whether it ends the start, so that a plan has one of them per start.

    statuses: beside 0, of a launch in which it has struck. says: what the launch then prints, a regular expression.
    refused: what the next start says, with status 2, until `undo` has restored the place from the spare one.
    own_disk: needs a small disk, which needs a mount. alone: no other fault strikes in its start. second_launch: the
    driver launches the run once more when it strikes, which must be refused.
    """

    act: Callable[[Fault, Rank], None]
    phases: tuple[str, ...]
    victims: tuple[str, ...] = ()
    statuses: frozenset[int] = frozenset()
    says: str = ""
    weight: float = 1.0
    lasting: tuple[int, int] = (1, 4)
    own_disk: bool = False
    placed_only: bool = False
    ends: bool = True
    alone: bool = False
    second_launch: bool = False
    refused: str = ""
    undo: Callable[[Path, Path], None] = field(default=lambda place, spare: None)


def signal_victims(number: signal.Signals) -> Callable[[Fault, Rank], None]:
    def act(fault: Fault, rank: Rank) -> None:
        names = RANKS if fault.victim == BOTH else (fault.victim,)
        for name in sorted(names, key=lambda name: name == f"rank {rank.number}"):  # this process last
            with suppress(ProcessLookupError):
                os.kill(rank.process(name), number)

    return act


def pause(fault: Fault, rank: Rank) -> None:
    """SIGSTOP, and SIGCONT some seconds later, by a process that goes on meanwhile."""
    pid = rank.process(fault.victim)
    script = f"kill -STOP {pid}; sleep {fault.lasting}; kill -CONT {pid}"
    os.posix_spawn("/bin/sh", ["sh", "-c", script], {}, setsid=True)


def slow_down(fault: Fault, rank: Rank) -> None:
    """A tenth of the speed: each step is followed by nine of its lengths."""
    last = time.perf_counter()

    def wait() -> None:
        nonlocal last
        time.sleep(9 * min(time.perf_counter() - last, 1.0))
        last = time.perf_counter()

    rank.each_step.append(wait)
    rank.end_after(fault.lasting, lambda: rank.each_step.remove(wait))


def wait_for_second_launch(fault: Fault, rank: Rank) -> None:
    """Then this launch is asked to save and end: it must still be able to."""
    while not (rank.folder / ANSWERED).exists():
        time.sleep(0.1)
    os.kill(rank.process("supervisor"), signal.SIGTERM)


def set_clock_back(fault: Fault, rank: Rank) -> None:
    real = time.time
    time.time = lambda: real() - 86400.0
    rank.end_after(fault.lasting, lambda: setattr(time, "time", real))


def fill_disk(fault: Fault, rank: Rank) -> None:
    """The disk of the run folder takes nothing more, until another process's files have gone."""
    ballast = rank.place / RUNS / BALLAST
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        for size in (2**20, 4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    rank.end_after(fault.lasting, lambda: ballast.unlink(missing_ok=True))


def empty_disk(place: Path, _spare: Path) -> None:
    (place / RUNS / BALLAST).unlink(missing_ok=True)


def take_descriptors(fault: Fault, rank: Rank) -> None:
    """No file can be opened any more: the limit is at what is open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    held = []
    with suppress(OSError):
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))

    def give_back() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)

    rank.end_after(fault.lasting, give_back)


def fail_to_read(fault: Fault, rank: Rank) -> None:
    """Python can open no file of a folder to read it; of checkpoints, not the next one."""
    folder, real = f"/{fault.victim}/", io.open

    def open_or_fail(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "r" not in mode or folder not in f"/{file}":
            return real(file, mode, *arguments, **options)
        rank.record(fault)
        if fault.victim == "checkpoints":
            io.open = builtins.open = real
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    io.open = builtins.open = open_or_fail


def bus_error(fault: Fault, rank: Rank) -> None:
    """What the kernel does to a process that reads a page of a mapped file which the disk cannot give."""
    os.kill(os.getpid(), signal.SIGBUS)


def replace_base(fault: Fault, rank: Rank) -> None:
    _exchange(rank.place / "base", rank.place / "other-base")


def restore_base(place: Path, spare: Path) -> None:
    _restore(place, spare, "base")


def replace_prepared(fault: Fault, rank: Rank) -> None:
    _exchange(rank.place / "prepared", rank.place / "other-prepared")


def restore_prepared(place: Path, spare: Path) -> None:
    _restore(place, spare, "prepared")


def cut_prepared(fault: Fault, rank: Rank) -> None:
    """Rewritten in place, as `cp` does: reads of the mapped rows then end in SIGBUS."""
    for path in (rank.place / "prepared" / "train").glob("*.arrow"):
        os.truncate(path, 0)


def _exchange(folder: Path, other: Path) -> None:
    folder.rename(folder.with_name(f"{folder.name}-before"))
    other.rename(folder)


def _restore(place: Path, spare: Path, name: str) -> None:
    subprocess.run(["rm", "-rf", place / name, place / f"{name}-before", place / f"other-{name}"], check=True)
    for each in (name, f"other-{name}"):
        subprocess.run(["cp", "-a", spare / each, place / each], check=True)


FAILS = frozenset({FAULT})
KINDS = {
    "SIGKILL": Kind(
        signal_victims(signal.SIGKILL), ANY_PHASE, (*RANKS, BOTH), FAILS, NOT_ENOUGH_MEMORY, weight=6.0
    ),
    "SIGKILL, calibrating": Kind(
        signal_victims(signal.SIGKILL), ("calibration",), (*RANKS, BOTH), FAILS, NOT_ENOUGH_MEMORY, placed_only=True
    ),
    "SIGKILL, launcher": Kind(
        signal_victims(signal.SIGKILL), (IMPORTS, *WHOLE_RUN), ("launcher",), frozenset({FAULT, STOPPED})
    ),
    "SIGKILL, supervisor": Kind(
        signal_victims(signal.SIGKILL), (IMPORTS, *WHOLE_RUN), ("supervisor",), frozenset({KILLED})
    ),
    "SIGTERM": Kind(
        signal_victims(signal.SIGTERM), (IMPORTS, *WHOLE_RUN, "prune"), PROCESSES,
        frozenset({STOPPED}), weight=2.0,
    ),
    "SIGINT": Kind(
        signal_victims(signal.SIGINT), (IMPORTS, *WHOLE_RUN), ("supervisor",), frozenset({STOPPED}), weight=1.0
    ),
    "second launch": Kind(
        wait_for_second_launch, ("step", "evaluation"), (), frozenset({STOPPED}), alone=True, second_launch=True
    ),
    "SIGSTOP for good": Kind(
        signal_victims(signal.SIGSTOP), TRAINING, RANKS, FAILS,
        "suspended|did not end in time|does not answer|killed from outside", weight=0.3,
    ),
    "bus error": Kind(bus_error, ("base read", "rows read"), (), FAILS, "Bus error|SIGBUS"),
    "EIO": Kind(
        fail_to_read, ("checks",), ("base", "prepared"), frozenset({FAULT, MISTAKE}), "Input/output error"
    ),
    "prepared set cut": Kind(
        cut_prepared, ("prune",), (), FAILS, refused="data.prepared_dir: .* is damaged", undo=restore_prepared
    ),
    # Training goes on, where it can.
    "SIGSTOP, SIGCONT": Kind(
        pause, WHOLE_RUN, PROCESSES, lasting=(1, 3), weight=2.0, ends=False
    ),
    "EIO of a checkpoint": Kind(  # fails only where the run was asked to stop, and the save for it is read back
        fail_to_read, ("resume point",), ("checkpoints",), FAILS, "could not be saved: .*Input/output error", ends=False
    ),
    "slow rank": Kind(slow_down, ("step",), lasting=(1, 3), ends=False),
    "clock set back": Kind(set_clock_back, WHOLE_RUN, ends=False),
    "disk full": Kind(
        fill_disk, TRAINING, (), FAILS, "No space left", own_disk=True, weight=2.0, undo=empty_disk, ends=False
    ),
    "disk full at the end": Kind(
        fill_disk, ("pictures", "publish"), (), FAILS, "cannot be written", own_disk=True, undo=empty_disk, ends=False
    ),
    "no more files": Kind(take_descriptors, TRAINING, (), FAILS, "Too many open files", ends=False),
    "base replaced": Kind(
        replace_base, ("prune",), ends=False, refused="base.model holds something else", undo=restore_base
    ),
    "prepared set replaced": Kind(
        replace_prepared, ("prune",), ends=False, refused="data.held_out: the recipe says", undo=restore_prepared
    ),
}  # fmt: skip


def act(fault: Fault, rank: Rank) -> None:
    """Lets a fault strike in this rank."""
    kind = KINDS[fault.kind]
    if kind.act is not fail_to_read:  # which counts once something is read
        rank.record(fault)
    kind.act(fault, rank)


# What happens to files between two starts.


def make_files_old(run: Path) -> None:
    """As if the clock was set back, or the folder was restored from an archive."""
    for path in run.rglob("*"):
        os.utime(path, (10**9, 10**9))


def damage_newest_checkpoint(run: Path) -> None:
    """One bit of its last file with tensors."""
    steps = sorted((run / "checkpoints").glob("step-*"))
    files = sorted(steps[-1].glob("*.safetensors")) if steps else []
    if files:
        content = bytearray(files[-1].read_bytes())
        content[len(content) // 2] ^= 1
        files[-1].write_bytes(content)


def leave_partial_save(run: Path) -> None:
    """What a machine that lost power leaves."""
    if (run / "checkpoints").is_dir():
        folder = run / "checkpoints" / ".step-000999.partial"
        folder.mkdir(exist_ok=True)
        (folder / "state-00001.safetensors").write_bytes(b"half")


def cut_last_line(run: Path) -> None:
    """Of metrics beyond the newest checkpoint: half a line."""
    path = run / "metrics.jsonl"
    if path.is_file():
        with path.open("ab") as file:
            file.write(b'{"step": 9')


def fill_shared_memory(_run: Path) -> None:
    """For everything that runs until the next start of any run."""
    with suppress(OSError), (SHARED_MEMORY / BALLAST).open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def free_shared_memory() -> None:
    (SHARED_MEMORY / BALLAST).unlink(missing_ok=True)


AT_REST: dict[str, Callable[[Path], None]] = {
    "files made old": make_files_old,
    "checkpoint damaged": damage_newest_checkpoint,
    "half a save left": leave_partial_save,
    "half a line of metrics": cut_last_line,
    "/dev/shm full": fill_shared_memory,
}
OWN_DISK_AT_REST = {"/dev/shm full"}
