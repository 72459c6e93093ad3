"""A soak: real runs of two ranks under random faults, until the time ends.

    python -m benchmarks.soak [--minutes N] [--seed S] [--runs N]

Runs with and without expert placement, two side by side, are killed, stopped, paused, robbed of their disk, and so on:
`kinds.py` has the table. Each must end equal to the run that nothing happened to, bit for bit. Limits follow from the
time that the unbroken run takes on this machine. A run that does not survive is printed with its seed, and
`--seed S --runs 1` replays it.

Some faults need a disk of their own. It is mounted in a mount namespace (`unshare`) that ends with the soak; where that
is not allowed, these faults are left out.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

INSIDE = "SOAK_NAMESPACE"  # variable: this process has a mount namespace of its own
UNSHARE = ["unshare", "--mount"], ["unshare", "--mount", "--user", "--map-root-user"]  # for root, and for others


def enter_namespace() -> bool:
    """Starts this program again where it may mount disks that nobody else sees; returns whether it is there."""
    if INSIDE in os.environ:
        return True
    for words in UNSHARE:
        test = [*words, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        if shutil.which(words[0]) and subprocess.run(test, capture_output=True).returncode == 0:
            os.execvpe(
                words[0],
                [*words, sys.executable, "-m", "benchmarks.soak", *sys.argv[1:]],
                {**os.environ, INSIDE: "1"},
            )
    print("no disk can be mounted here: faults of full disks are left out", flush=True)
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes",
        type=float,
        default=5.0,
        help="of faults; then runs come to their end",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each further one adds 1")
    parser.add_argument("--runs", type=int, help="exactly so many, whatever time they take")
    options = parser.parse_args(arguments)
    own_disk = enter_namespace()
    from benchmarks.soak.driver import numbers, soak, table  # heavy, and only once

    began = time.monotonic()
    minutes = options.minutes if options.runs is None else float("inf")
    seeds = itertools.islice(itertools.count(options.seed), options.runs)
    with tempfile.TemporaryDirectory() as name:
        found = soak(Path(name), seeds, minutes, own_disk)
    print(f"\n{table(found)}\n")
    print(json.dumps(numbers(found, (time.monotonic() - began) / 60)))
    return int(any(one.problem for one in found))


if __name__ == "__main__":
    sys.exit(main())
