"""What a run and its launcher exchange: exit statuses, environment variables, and a file per rank on how it ended."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

MISTAKE = 2  # exit status after a user's mistake
FAULT = 1  # exit status after a fault at run time
STOPPED = 75  # exit status of a run that a signal stopped after it saved: EX_TEMPFAIL of sysexits, "run me again"
INTERRUPTED = 130  # exit status after Ctrl-C with nothing to save: 128 + SIGINT

ENDINGS = "TEAMLORA_ENDINGS"  # variable: folder for each rank's `Ending`, which DeepSpeed's launcher does not report
AGAIN = "TEAMLORA_AGAIN"  # variable: this launch has started ranks before, so the run it finds is its own
LAUNCH_ID = "TEAMLORA_LAUNCH_ID"  # variable: LAUNCH.START, shared by all ranks of one start and by no other start


def launch_of(start: str | None) -> str | None:
    """The part of a LAUNCH_ID that all starts of a launch share: those after a fault, or from the queue again."""
    return start.partition(".")[0] if start else None


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    line: its last message. followed: it ended only because another rank had ended or did not answer, so the line
    does not name the cause.
    """

    status: int
    line: str = ""
    followed: bool = False

    @property
    def failed(self) -> bool:
        """Whether it neither finished nor stopped on request."""
        return self.status not in (0, STOPPED)


def write_ending(ending: Ending) -> None:
    """Writes this rank's ending to the folder its launcher named; without one, writes nothing."""
    if ENDINGS in os.environ and "RANK" in os.environ:
        from data_prep.publish import write_atomically  # imports what a rank's start has no use for

        write_atomically(Path(os.environ[ENDINGS]) / os.environ["RANK"], json.dumps(asdict(ending)))


def read_endings(folder: Path) -> dict[int, Ending]:
    """{rank: ending} of the ranks that have written one."""
    return {
        int(path.name): Ending(**json.loads(path.read_text(encoding="utf-8")))
        for path in folder.iterdir()
        if path.name.isdecimal()
    }
