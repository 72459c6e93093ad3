"""How the ranks of one machine ended, as their supervisor sees it. Small programs play launcher and rank."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.cluster.launch_outcome import KILLED, OUT_OF_MEMORY, Outcome
from trainer.cluster.local_ranks import SUSPENDED, LocalRanks
from trainer.run.launch_protocol import FAULT, STOPPED

REPOSITORY = Path(__file__).parent.parent.parent

# Starts rank 1, sends it these signals half a second apart, and ends as DeepSpeed's launcher does.
LAUNCHER = """
import os, subprocess, sys, time
program = [sys.executable, "-c", "import time; time.sleep(60)"]
rank = subprocess.Popen(program, env={**os.environ, "RANK": "1"})
for number in map(int, sys.argv[1:]):
    time.sleep(0.5)
    rank.send_signal(number)
rank.wait()
sys.exit(1)
"""
STOP, GO_ON, KILL = signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL


@pytest.mark.parametrize(
    ("signals", "line"),
    [([KILL], KILLED), ([STOP, KILL], SUSPENDED), ([STOP, GO_ON, KILL], KILLED), ([STOP], SUSPENDED)],
    ids=["killed", "suspended, and killed by the launcher", "went on, and was killed", "suspended for good"],
)
def test_a_rank_that_was_killed_while_it_was_suspended_is_said_to_be_suspended(signals, line):
    command = [sys.executable, "-c", LAUNCHER, *(str(int(number)) for number in signals)]
    ranks = LocalRanks(command, {name: text for name, text in os.environ.items() if name != "RANK"}, grace=30)
    ranks.kill_after(4)
    while ranks.poll():
        time.sleep(0.05)
    assert ranks.outcome() == Outcome(FAULT, f"rank 1: {line}")


# Starts rank 0, which stops as it is asked to, and does not end itself.
LASTING_LAUNCHER = """
import os, subprocess, sys, time
program = "from trainer.run.launch_protocol import *; write_ending(Ending(STOPPED)); raise SystemExit(STOPPED)"
subprocess.run([sys.executable, "-c", "import time; time.sleep(0.5);" + program], env={**os.environ, "RANK": "0"})
time.sleep(60)
"""


def test_ranks_say_how_a_launch_ended_whose_launcher_does_not_end():
    environment = {**{name: text for name, text in os.environ.items() if name != "RANK"}, "PYTHONPATH": str(REPOSITORY)}
    ranks = LocalRanks([sys.executable, "-c", LASTING_LAUNCHER], environment, grace=1)
    while ranks.poll():
        time.sleep(0.05)
    assert ranks.outcome() == Outcome(STOPPED)


# LocalRanks in the group that the argument names, with a rank that takes more memory than is allowed there.
IN_GROUP = """
import os, sys, time
from pathlib import Path
from trainer.cluster.local_ranks import LocalRanks
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
eat = "import os, subprocess, sys; os.environ['RANK'] = '1'; sys.exit(subprocess.call([sys.executable, '-c', {!r}]))"
rank = "import time; time.sleep(1); b'x' * 2**31"
ranks = LocalRanks([sys.executable, "-c", eat.format(rank)], os.environ, grace=30)
while ranks.poll():
    time.sleep(0.05)
print(ranks.outcome())
"""


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group inside this process's, whose processes may hold 512 MiB together."""
    groups = Path("/sys/fs/cgroup")
    ours = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
    inside = (
        groups / "memory" / ours["memory"].lstrip("/") if "memory" in ours else groups / ours.get("", "").lstrip("/")
    )
    group = inside / f"teamlora-test-{os.getpid()}"
    limits = [group / "memory.max", group / "memory.limit_in_bytes"]
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error.strerror}")
    try:
        if not any(limit.exists() for limit in limits):
            pytest.skip("the control group that can be made limits no memory")
        next(limit for limit in limits if limit.exists()).write_text(str(2**29))
        yield group
    finally:
        group.rmdir()


def test_a_rank_that_the_system_kills_for_its_memory_is_told_from_one_that_was_killed_otherwise(small_group):
    done = subprocess.run([sys.executable, "-c", IN_GROUP, small_group], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(Outcome(FAULT, f"rank 1: {OUT_OF_MEMORY}")), done.stderr
