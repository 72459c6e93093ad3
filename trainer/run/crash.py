"""What a rank leaves where a signal from C code ends it, which no `except` sees: its stacks, for its launcher.

NCCL's watchdog thread aborts the process (SIGABRT) when a collective runs into its time-out or another rank is gone
(TORCH_NCCL_ASYNC_ERROR_HANDLING, by default 3, in torch 2.13); gloo raises instead. Without these files such a rank
would look as if the system had killed it for its memory.
"""

import faulthandler
import os
import re
import signal
from pathlib import Path

from trainer.run.launch_protocol import ENDINGS, FAULT, Ending

SUFFIX = ".crash"
CAUSES: dict[int, str] = {
    signal.SIGBUS: "a file of the base or the prepared set could not be read, or was cut meanwhile",
    signal.SIGSEGV: "a library crashed",
    signal.SIGABRT: "a library gave up; with NCCL a rank aborts when a collective waits longer than "
    "run.collective_timeout, or another rank is gone",
}


def record_crashes() -> None:
    """From now on a crash writes all threads' stacks: for the launcher to the folder it named, else to stderr."""
    folder = Path(os.environ.get(ENDINGS, ""))
    if ENDINGS in os.environ and "RANK" in os.environ and folder.is_dir():
        faulthandler.enable((folder / f"{os.environ['RANK']}{SUFFIX}").open("wb"))  # until the process ends
    elif not faulthandler.is_enabled():
        faulthandler.enable(2)  # the number, since sys.stderr may be replaced or closed


def crash_stacks(folder: Path, rank: int) -> str:
    """What a rank wrote as it crashed; empty where it did not crash."""
    path = folder / f"{rank}{SUFFIX}"
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def crash_ending(stacks: str) -> Ending:
    """How a rank ended that wrote these stacks.

    An abort mostly follows from another rank, so it counts as the cause only where no other rank gives one.
    """
    name = stacks.partition("\n")[0].removeprefix("Fatal Python error: ")
    threads = [part for part in stacks.split("\n\n") if "File " in part]
    current = next((part for part in threads if part.startswith("Current thread")), threads[-1] if threads else "")
    found = re.search(r'File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>\S+)', current)
    place = f" in {found['name']}, {Path(found['file']).name} line {found['line']}" if found else ""
    number = next((number for number in CAUSES if signal.strsignal(number) == name), None)
    cause = f"; {CAUSES[number]}" if number else ""
    return Ending(FAULT, f"crashed ({name}){place}{cause}", followed=number == signal.SIGABRT)
