"""Runs of many seeds, side by side: what they need, what they found, as a table and as numbers."""

import itertools
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.shared.processor import processor
from benchmarks.soak.forked import MAKE_SPARE, Server
from benchmarks.soak.kinds import AT_REST, KINDS, SHARED_MEMORY
from benchmarks.soak.plan import is_placed, plan_run
from benchmarks.soak.run import Found, Pace, Setting, SoakedRun, arguments, environment, mount, unbroken_name
from data_prep.tables import text_table

SIDE_BY_SIDE = 2
UNBROKEN_LIMIT = 3600.0  # seconds; far beyond any machine's pace, as nothing has been measured yet


def finish(server: Server, words: Sequence[str], folder: Path) -> float:
    """Runs a command to which nothing happens; seconds that it took."""
    began, log = time.monotonic(), folder / f"{words[-1]}.log"
    if server.run(words, folder, log).wait(UNBROKEN_LIMIT):
        raise RuntimeError(log.read_text())
    return time.monotonic() - began


def run_unbroken(server: Server, spare: Path, unbroken: Path, variants: set[bool]) -> float:
    """The runs that others are compared with, as much at once as in the soak itself; seconds of the slower one.

    variants: with placement, and without.
    """

    def run(placed: bool) -> float:
        name = [f"run.output_dir={unbroken}", f"run.name={unbroken_name(placed)}"]
        return finish(server, ["launch", *arguments(placed), *name], spare)

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return max(pool.map(run, variants))


def soak(folder: Path, seeds: Iterator[int], minutes: float, own_disk: bool) -> list[Found]:
    """Runs of these seeds, side by side, while there are seeds and time. minutes: of faults, once the pace is known."""
    if own_disk:
        mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(SHARED_MEMORY))
    server = Server(environment())
    try:
        spare, unbroken = folder / "spare", folder / "unbroken"
        spare.mkdir()
        finish(server, [MAKE_SPARE], spare)
        first = list(itertools.islice(seeds, SIDE_BY_SIDE))
        pace = Pace(server.seconds, run_unbroken(server, spare, unbroken, set(map(is_placed, first))))
        print(
            f"unbroken        {pace.seconds:.0f} s and imports {pace.imports:.0f} s: a start may take "
            f"{pace.limit:.0f} s",
            flush=True,
        )
        until = time.monotonic() + 60 * minutes
        return run_seeds(itertools.chain(first, seeds), folder, Setting(spare, unbroken, pace, server, own_disk, until))
    finally:
        server.close()


def run_seeds(seeds: Iterator[int], folder: Path, setting: Setting) -> list[Found]:
    found: list[Found] = []
    lock = threading.Lock()

    def next_seed() -> int | None:
        with lock:
            return next(seeds, None) if time.monotonic() < setting.until else None

    def work(_: int) -> None:
        while (seed := next_seed()) is not None:
            place = folder / f"place-{seed}"
            one = SoakedRun(plan_run(seed, setting.own_disk, setting.pace.imports), place, setting).survive()
            shutil.rmtree(place, ignore_errors=True)
            with lock:
                found.append(one)
                print(describe(one), flush=True)

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        list(pool.map(work, range(SIDE_BY_SIDE)))
    return found


def describe(found: Found) -> str:
    plan = found.plan
    line = f"seed {plan.seed}: {found.faults.total():2} faults in {found.starts} starts, "
    line += "with placement" if plan.placed else "without placement"
    if not found.problem:
        return f"{line}: equal to the unbroken run"
    replay = f"python -m benchmarks.soak --seed {plan.seed} --runs 1"
    return f"{line}: FAILED: {found.problem}\n{found.log}\nreplay: {replay}"


def table(found: Sequence[Found]) -> str:
    """Faults by kind, and how many of them were in runs that survived."""
    all_faults, survived = Counter[str](), Counter[str]()
    for one in found:
        all_faults.update(one.faults)
        if not one.problem:
            survived.update(one.faults)
    names = [name for name in (*KINDS, *AT_REST) if all_faults[name]]
    return text_table(
        ("fault", "times", "in runs that survived"), [(n, str(all_faults[n]), str(survived[n])) for n in names]
    )


def numbers(found: Sequence[Found], minutes: float) -> dict[str, Any]:
    faults = sum((one.faults for one in found), Counter[str]())
    failed = [one.plan.seed for one in found if one.problem]
    return {
        "faults": faults.total(),
        "lost_checkpoints": sum(one.lost_checkpoints for one in found),
        "equal": bool(found) and not failed,
        "runs": len(found),
        "starts": sum(one.starts for one in found),
        "failed_seeds": failed,
        "faults_by_kind": dict(sorted(faults.items())),
        "minutes": round(minutes, 1),
        "processor": processor(),
    }
