"""One soaked run: starts the real command again and again, with the faults of its plan, and checks what follows."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.soak.forked import Running, Server
from benchmarks.soak.kinds import ANSWERED, AT_REST, KINDS, RUNS, free_shared_memory
from benchmarks.soak.phases import FOLDER, IMPORTS, RANKS, Fault, fired, write_faults
from benchmarks.soak.plan import Plan, Start
from tests.support.workplace import REPOSITORY, SCRIPT, ZERO3, ranks_of
from trainer.checkpoint import storage
from trainer.run.launch_protocol import MISTAKE

STEPS, SAVE_EVERY, EVAL_EVERY = 24, 3, 5
DISK = "32m"
HALF_WRITTEN = (".partial", ".part", ".new", ".old")
SPEED = ("step_seconds", "tokens_per_second", "labelled_tokens_per_second", "peak_memory_bytes")
RESUMED = re.compile(r"^resume .*?(?:at step (\d+)|from the first step)$", re.MULTILINE)
TRACEBACK = re.compile("^Traceback", re.MULTILINE)  # not within a line of torch's log: about what it can do without
HOOK = """import os
if "RANK" in os.environ:
    from benchmarks.soak.phases import arm
    arm()
"""


@dataclass(frozen=True)
class Pace:
    """Of this machine. imports: seconds for all imports; seconds: that the slower unbroken run takes after them."""

    imports: float
    seconds: float

    @property
    def limit(self) -> float:
        """Seconds that a start may take: several times what it takes when nothing happens."""
        return 6 * (self.imports + self.seconds) + 60

    @property
    def collective_timeout(self) -> float:
        return max(20.0, self.seconds)


@dataclass
class Found:
    """What became of one run. problem: why it did not survive; empty if it did."""

    plan: Plan
    faults: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    lost_checkpoints: int = 0
    problem: str = ""
    log: str = ""


class Problem(AssertionError):
    """A start or the run did not go as it must."""


def arguments(placed: bool, calibrated: bool = False) -> list[str]:
    """What every start of a run is given. calibrated: dispatch is measured; no such start trains."""
    size = ["experts.parallel_size=2", f"experts.dispatch={'auto' if calibrated else 'weights'}"] if placed else []
    length = [f"train.steps={STEPS}", f"train.eval_every={EVAL_EVERY}", f"checkpoint.save_every={SAVE_EVERY}"]
    return ["num_gpus=2", "recipe.yaml", ZERO3, *length, *size]


@dataclass(frozen=True)
class Setting:
    """What all runs share. spare: a folder with a base, a prepared set and others of each, which a run gets copies of.

    until: when, on the clock of time.monotonic, no more faults begin. unbroken: folder of the runs to compare with.
    """

    spare: Path
    unbroken: Path
    pace: Pace
    server: Server
    own_disk: bool
    until: float


class SoakedRun:
    """One run in a folder of its own."""

    def __init__(self, plan: Plan, folder: Path, setting: Setting) -> None:
        self.plan, self.setting = plan, setting
        self.place = folder
        self.name = f"soak-{plan.seed}"
        self.run = folder / RUNS / self.name
        self.found = Found(plan)
        self.launches = 0  # starts, and those that had to be refused

    def survive(self) -> Found:
        """Goes through all starts; what was found."""
        shutil.copytree(self.setting.spare, self.place)
        (self.place / RUNS).mkdir()
        if self.setting.own_disk:
            mount("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self.place / RUNS))
        try:
            finished = any(self._start(start) for start in self._starts_in_time())
            if not finished:
                raise Problem("the last start did not finish the run")
            if different := difference(self.run, self.setting.unbroken / unbroken_name(self.plan.placed)):
                raise Problem(different)
        except (Problem, subprocess.TimeoutExpired) as error:
            self.found.problem = str(error)
        finally:
            self._end_all()
            if self.setting.own_disk:
                subprocess.run(["umount", "-l", self.place / RUNS], check=True)
        return self.found

    def _starts_in_time(self) -> Iterator[Start]:
        """Those of the plan; once the time is up only its last, which lets the run come to its end."""
        *others, last = self.plan.starts
        for start in others:
            if time.monotonic() < self.setting.until:
                yield start
        yield last

    def _start(self, start: Start) -> bool:
        """One start, and one that is refused where a fault asks for it; returns whether the run is finished."""
        self._change_files(start.before)
        newest = self._newest()
        status, said, struck = self._launch(start.faults)
        self.found.starts += 1
        self.found.faults.update(fault.kind for fault in struck)
        if not any(fault.kind == "EIO of a checkpoint" for fault in struck):  # an older one is right then
            self._check_resumed(said, newest)
        check_ending(status, said, struck)
        if not struck and (left := sorted(p.name for p in self.run.rglob(".*") if p.suffix in HALF_WRITTEN)):
            raise Problem(f"left behind: {', '.join(left)}")
        refused = [KINDS[fault.kind] for fault in struck if KINDS[fault.kind].refused]
        finished = (self.run / "adapter").is_dir()  # whatever struck after that
        if refused and not finished:
            status, said, _ = self._launch([])
            if status != MISTAKE or not any(re.search(kind.refused, said) for kind in refused):
                raise Problem(f"expected a refusal: {' or '.join(kind.refused for kind in refused)}, status {status}")
        for fault in struck:
            KINDS[fault.kind].undo(self.place, self.setting.spare)
        return finished

    def _change_files(self, names: list[str]) -> None:
        if self.setting.own_disk:
            free_shared_memory()
        for name in names if self.run.is_dir() and not (self.run / "adapter").is_dir() else ():
            AT_REST[name](self.run)
            self.found.faults[name] += 1

    def _newest(self) -> int:
        """Step of the newest intact checkpoint; 0 without one."""
        found = storage.newest_intact(self.run / "checkpoints")
        return next((int(folder.name.partition("-")[2]) for folder, problem in found if problem is None), 0)

    def _launch(self, faults: list[Fault]) -> tuple[int, str, list[Fault]]:
        """Status, output and the faults that struck, once nothing of the launch is left."""
        self.launches += 1
        folder, log = (self.place / f"{word}-{self.launches}" for word in ("faults", "log"))
        write_faults(folder, faults)
        began = time.monotonic()
        launched = self._begin(faults, folder, log)
        try:
            if any(KINDS[fault.kind].second_launch for fault in faults):
                self._launch_again_once_struck(launched, faults, folder)
            status = launched.wait(self.setting.pace.limit)
        except subprocess.TimeoutExpired:
            launched.kill()
            raise
        else:
            self._wait_for_ranks(began + self.setting.pace.limit)
        finally:
            struck = fired(folder, faults)
            said = log.read_text(errors="replace")
            happened = "".join(f"\n  {fault}" for fault in struck)
            self.found.log += f"\n--- start {self.launches}, faults:{happened}\n{said}"
            self._end_all()
        self.found.log += f"--- status {status} after {time.monotonic() - began:.1f} s\n"
        return status, said, struck

    def _launch_again_once_struck(
        self, launched: subprocess.Popen | Running, faults: list[Fault], folder: Path
    ) -> None:
        """Launches the run once more while it trains, and checks that it is refused. Nothing if no fault strikes."""
        until = time.monotonic() + self.setting.pace.limit
        while not fired(folder, faults):
            if launched.has_ended() or time.monotonic() > until:
                return
            time.sleep(0.1)
        second, log = folder / "second", folder / "second.log"
        write_faults(second, [])
        try:
            status = self._begin([], second, log).wait(self.setting.pace.limit)
        finally:
            (folder / ANSWERED).touch()
        check_refused_for(int((folder / RANKS[0]).read_text()), status, log.read_text(errors="replace"))

    def _begin(self, faults: list[Fault], folder: Path, log: Path) -> subprocess.Popen | Running:
        """By the real command where a fault strikes while it imports; else as forks, which have imported everything."""
        pace, placed = self.setting.pace, self.plan.placed
        words = [*arguments(placed, calibrated=any(fault.phase == "calibration" for fault in faults))]
        words += [f"run.name={self.name}", f"run.collective_timeout={pace.collective_timeout:.0f}"]
        words += [f"run.start_timeout={pace.limit:.0f}"]
        if not any(fault.phase == IMPORTS for fault in faults):
            return self.setting.server.run(["launch", *words], self.place, log, **{FOLDER: str(folder)})
        hooks = folder / "hooks"
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(HOOK)
        variables = {FOLDER: str(folder), "PYTHONPATH": f"{hooks}{os.pathsep}{REPOSITORY}"}
        with log.open("w") as output:
            return subprocess.Popen(
                ["bash", SCRIPT, *words], cwd=self.place, env=environment(**variables),
                stdout=output, stderr=output,
            )  # fmt: skip

    def _wait_for_ranks(self, deadline: float) -> None:
        """Ranks whose supervisor was killed train on; of other launches none is left."""
        while left := ranks_of(self.name):
            if time.monotonic() > deadline:
                raise Problem(f"still running: {left}")
            time.sleep(0.1)

    def _end_all(self) -> None:
        for pid in ranks_of(self.name).values():
            with suppress(ProcessLookupError):
                os.kill(pid, 9)

    def _check_resumed(self, said: str, newest: int) -> None:
        match = RESUMED.search(said)
        if match and int(match[1] or 0) < newest:
            self.found.lost_checkpoints += 1
            raise Problem(f"went on from step {match[1] or 0}, with a whole checkpoint of step {newest}")


def unbroken_name(placed: bool) -> str:
    return f"unbroken-{'placed' if placed else 'plain'}"


def check_ending(status: int, said: str, struck: list[Fault]) -> None:
    """Raises Problem where a start ended otherwise than its faults must end it."""
    kinds = [KINDS[fault.kind] for fault in struck]
    allowed = {0}.union(*(kind.statuses for kind in kinds))
    if status not in allowed:
        raise Problem(f"ended with status {status}, expected {' or '.join(map(str, sorted(allowed)))}")
    if status and not any(re.search(kind.says, said) for kind in kinds if status in kind.statuses):
        raise Problem(f"said nothing like {' or '.join(repr(kind.says) for kind in kinds if kind.statuses)}")
    if TRACEBACK.search(said):
        raise Problem("ended in a traceback")


def check_refused_for(pid: int, status: int, said: str) -> None:
    """Raises Problem unless a second launch was refused in a line that names the process that holds the lease."""
    if status != MISTAKE or f"another launch trains there: process {pid} on " not in said:
        raise Problem(f"a second launch did not name process {pid}, and ended with status {status}:\n{said}")


def difference(run: Path, expected: Path) -> str:
    """How a run differs from the unbroken one, in its numbers at each step or its adapter; empty if it does not."""
    found, wanted = records(run), records(expected)
    if len(found) != len(wanted):
        return f"metrics.jsonl has {len(found)} lines instead of {len(wanted)}"
    for one, other in zip(found, wanted, strict=True):
        if one != other:
            keys = [key for key in other if one.get(key) != other[key]]
            return f"metrics.jsonl differs at step {other['step']}: {', '.join(keys)}"
    tensors, wanted_tensors = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, expected))
    if tensors.keys() != wanted_tensors.keys():
        return "the adapter has other tensors"
    unequal = [name for name, tensor in wanted_tensors.items() if not np.array_equal(tensors[name], tensor)]
    if unequal:
        return f"{len(unequal)} tensors of the adapter differ, such as {unequal[0]}"
    return ""


def records(run: Path) -> list[dict[str, Any]]:
    """The numbers of each step, without those of speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEED} for line in lines]


def environment(**more: str) -> dict[str, str]:
    """Of commands: one thread per rank, CPUs only, and no compiler, which a small model does not repay."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **settings, "PATH": path, **more}


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)
