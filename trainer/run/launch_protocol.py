"""What a run and whoever starts it tell each other: exit statuses, environment variables, how each rank ended."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

MISTAKE = 2  # exit status after a person's mistake
FAULT = 1  # exit status after a fault while running
STOPPED = 75  # exit status of a run that saved and ended as a signal asked: sysexits' EX_TEMPFAIL, "run me again"
INTERRUPTED = 130  # exit status after Ctrl-C where there is nothing to save: 128 and the signal's number

ENDINGS = "TEAMLORA_ENDINGS"  # variable: folder in which each rank leaves its `Ending`, which no launcher passes on
AGAIN = "TEAMLORA_AGAIN"  # variable: this launch has started ranks before, so what it finds is its own
LAUNCH_ID = "TEAMLORA_LAUNCH_ID"  # variable: a name that all ranks of one launch share, and no other launch has


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    line: what it said of it. followed: it ended because another rank had ended or did not answer, so the line tells
    no cause.
    """

    status: int
    line: str = ""
    followed: bool = False

    @property
    def failed(self) -> bool:
        """It neither finished nor stopped as it was asked to."""
        return self.status not in (0, STOPPED)


def write_ending(ending: Ending) -> None:
    """Leaves this rank's ending where its launcher asked for it; none asked, nothing is written."""
    if ENDINGS in os.environ and "RANK" in os.environ:
        path = Path(os.environ[ENDINGS]) / os.environ["RANK"]
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(ending)))
        part.rename(path)  # never read half-written


def read_endings(folder: Path) -> dict[int, Ending]:
    """{rank: its ending} of the ranks that have left one."""
    return {
        int(path.name): Ending(**json.loads(path.read_text())) for path in folder.iterdir() if path.name.isdecimal()
    }
