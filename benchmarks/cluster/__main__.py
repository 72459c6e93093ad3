"""How soon a launch on two emulated hosts ends after a fault, whether it goes on, and how soon a bad set-up is found.

    python -m benchmarks.cluster

Needs root and Debian's openssh-server, openssh-client and iproute2 (`bash tests/support/cluster/install.sh`). Runs of
two ranks under `bash launch/train.sh hostfile=...`, with both time-outs of the recipe at 15 s, meet each fault in turn.
The clock starts at the fault (for nodes that never start and ranks that cannot meet: at the command) and stops when no
process of the launch is left on any host. Then `teamlora check` has to find each bad set-up.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from tests.support.cluster.bad_setups import BAD_SETUPS, check_on_hosts
from tests.support.cluster.emulated import NODES, Cluster, emulated, ended, why_not
from tests.support.cluster.faults import FAULTS, write_raises
from tests.support.cluster.launching import Train, prepared_workplace, unable_to_meet
from tests.support.workplace import REPOSITORY, wait_for_steps

TIMEOUT = 15  # seconds
TOO_LONG = 60  # seconds after which a process counts as left running
ENDLESS = {"train__steps": 100_000, "train__eval_every": 0}
LIMITS = {"run__collective_timeout": TIMEOUT, "run__start_timeout": TIMEOUT}
SAVE_EVERY = 25
STEP_OF_HARM = 60


def fault_in_mid_run(train: Train, name: str) -> tuple[float, int, str]:
    """Seconds until nothing runs on any host, how many processes still do after too long, and what the launch said."""
    run = name.replace(" ", "_")
    launched = train.begin_supervised(*NODES, options=["check=false"], run__name=run, **ENDLESS, **LIMITS)
    wait_for_steps(train.metrics(run), 3)
    with FAULTS[name].harm(train.cluster):
        started = time.monotonic()
        left = train.cluster.wait_until_idle(TOO_LONG)
        seconds = time.monotonic() - started
    train.cluster.clear()
    return seconds, len(left), cause_of(ended(launched).stderr)


def fault_at_the_start(train: Train, harm: AbstractContextManager, run: str) -> tuple[float, int, str]:
    with harm:
        started = time.monotonic()
        launched = train.begin_supervised(*NODES, options=["check=false"], run__name=run, **LIMITS)
        while launched.poll() is None and time.monotonic() - started < TOO_LONG:
            time.sleep(0.05)
        left = train.cluster.wait_until_idle(TOO_LONG)
        seconds = time.monotonic() - started
    train.cluster.clear()
    return seconds, len(left), cause_of(ended(launched).stderr)


def cause_of(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith(("launch          failed on ", "error: "))]
    return lines[-1].removeprefix("launch          failed on ") if lines else "nothing was said"


def goes_on(train: Train) -> tuple[bool, int]:
    """Whether a run whose node loses its ranks finishes under retries=1, and the steps that it did again."""
    numbers = {"train__steps": 3 * STEP_OF_HARM, "train__eval_every": 0, "checkpoint__save_every": SAVE_EVERY}
    launched = train.begin_supervised(
        *NODES, options=["check=false", "retries=1"], run__name="goes_on", **numbers, **LIMITS
    )
    wait_for_steps(train.metrics("goes_on"), STEP_OF_HARM)
    train.cluster.nodes["node-b"].ranks()[1].kill()
    train.cluster.nodes["node-a"].ranks()[0].wait(TOO_LONG)
    done = len(train.place.records("goes_on"))
    said = ended(launched)
    begun = re.search(r"resume .* at step (\d+)", said.stdout)
    steps = [record["step"] for record in train.place.records("goes_on")]
    whole = said.returncode == 0 and begun is not None and steps == list(range(1, 3 * STEP_OF_HARM + 1))
    return whole, done - int(begun[1]) if begun is not None else done


def found_set_up(cluster: Cluster, train: Train, name: str, folder: Path) -> tuple[bool, float, str]:
    """Whether `teamlora check` finds it where it is, and its seconds."""
    bad = BAD_SETUPS[name]
    with bad.make(cluster, train.place, folder):
        done, seconds = check_on_hosts(cluster, train.place, bad.hostfile, *bad.options)
    told = [each for each in json.loads(done.stdout)["findings"] if each["level"] != "ok"]
    found = any((each["host"], each["what"]) == (bad.host, bad.what) and bad.text in each["text"] for each in told)
    return found, seconds, "; ".join(f"{each['host']}: {each['text']}" for each in told)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    if (reason := why_not()) is not None:
        sys.exit(f"error: {reason}")
    with tempfile.TemporaryDirectory() as name:
        numbers = measure(Path(name))
    print(json.dumps(numbers))


def measure(folder: Path) -> dict[str, float]:
    for part in ("hosts", "place/recipe", "raises"):
        (folder / part).mkdir(parents=True)
    write_raises(folder / "raises")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = os.pathsep.join((str(folder / "raises"), str(REPOSITORY)))
    with emulated(folder / "hosts") as cluster:
        train = Train(cluster, prepared_workplace(folder / "place" / "recipe"))
        ends = {name: show(name, *fault_in_mid_run(train, name)) for name in FAULTS}
        for name, harm in (
            ("a node does not come", cluster.cut_off("node-b")),
            ("ranks do not meet", unable_to_meet(cluster)),
        ):
            ends[name] = show(name, *fault_at_the_start(train, harm, name.replace(" ", "_")))
        resumed, redone = goes_on(train)
        print(f"\nunder retries=1 the run {'finished' if resumed else 'did not finish'}; {redone} steps done again\n")
        checks = {}
        for number, name in enumerate(BAD_SETUPS):
            (own := folder / f"check-{number}").mkdir()
            checks[name] = found_set_up(cluster, train, name, own)
            found, seconds, told = checks[name]
            print(f"{seconds:6.1f} s  {'found' if found else 'MISSED':7}{name:28}{told[:120]}", flush=True)
    return {
        "worst_end_seconds": round(max(seconds for seconds, _ in ends.values()), 1),
        "left_running": sum(left for _, left in ends.values()),
        "resumed": int(resumed),
        "redone_steps": redone,
        "save_every": SAVE_EVERY,
        "found": sum(found for found, *_ in checks.values()),
        "set_ups": len(checks),
        "slowest_check_seconds": round(max(seconds for _, seconds, _ in checks.values()), 1),
    }


def show(name: str, seconds: float, left: int, said: str) -> tuple[float, int]:
    print(f"{seconds:6.1f} s  {left} left  {name:24}{said[:130]}", flush=True)
    return seconds, left


if __name__ == "__main__":
    main()
