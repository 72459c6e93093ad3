"""Phases of a training rank: the functions at whose entry a fault may strike. Runs inside each rank of a soaked run.

A sitecustomize.py on the rank's PYTHONPATH calls `arm`; the commands themselves are the real ones.
"""

import functools
import importlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "SOAK_FAULTS"  # variable: folder with faults.json, in which ranks leave their pids and what has happened
PLAN, FIRED = "faults.json", "fired"
RANKS = ("rank 0", "rank 1")
PROCESSES = (*RANKS, "launcher", "supervisor")
IMPORTS = "imports"  # the phase before any of these functions exists

# Phase -> where its function is looked up when it is called.
PHASES = {
    "resume point": ("trainer.training.train", "find_resume_point"),
    "checks": ("trainer.training.train", "plan_run"),
    "load": ("trainer.training.train", "_load"),
    "base read": ("trainer.base.safetensors_reader", "Weights.read"),
    "calibration": ("trainer.distributed.parallelize", "autotune"),
    "restore": ("trainer.training.train", "restore"),
    "step": ("trainer.training.trainer", "Trainer.train_step"),
    "rows read": ("trainer.training.trainer", "collate"),
    "backward": ("trainer.training.trainer", "apply_gradients"),
    "evaluation": ("trainer.training.trainer", "Trainer.held_out_loss"),
    "metrics": ("trainer.telemetry.metrics", "MetricsWriter.write"),
    "save": ("trainer.checkpoint.storage", "CheckpointWriter.add"),
    "save published": ("trainer.checkpoint.storage", "CheckpointWriter.publish"),
    "pointer": ("trainer.checkpoint.storage", "point"),
    "prune": ("trainer.checkpoint.storage", "_set_aside"),
    "pictures": ("trainer.telemetry.router_images", "RouterImages.draw"),
    "publish": ("trainer.training.train", "save_adapter"),
    "publish synced": ("data_prep.publish", "_flush"),
}
ON_BOTH_RANKS = {"checks", "load", "base read", "calibration", "restore", "step", "rows read", "backward", "evaluation"}


@dataclass(frozen=True)
class Fault:
    """One fault of one start.

    rank: at whose `entry`-th entry into `phase` it strikes, `delay` seconds later. victim: whom it hits, where it hits
    processes. lasting: steps, or seconds of a pause, after which it is over.
    """

    kind: str
    phase: str
    rank: int = 0
    entry: int = 1
    delay: float = 0.0
    victim: str = ""
    lasting: int = 0

    def __str__(self) -> str:
        whom = f" of {self.victim}" if self.victim else ""
        return f"{self.kind}{whom} at {self.phase} {self.entry} of rank {self.rank}, +{self.delay:.2f} s"


@dataclass
class Rank:
    """This process, as faults see it. place: folder of the base, the prepared set and the runs."""

    number: int
    folder: Path
    place: Path
    faults: list[Fault]
    act: Callable[[Fault, "Rank"], None]
    entries: Counter[str] = field(default_factory=Counter)
    known: dict[str, int] = field(default_factory=dict)
    each_step: list[Callable[[], None]] = field(default_factory=list)
    endings: list[tuple[int, Callable[[], None]]] = field(default_factory=list)  # (step entry, how a fault ends)

    def enter(self, phase: str) -> None:
        self.entries[phase] += 1
        if phase == "step":
            self._pass_step()
        for fault in self.faults:
            if (fault.rank, fault.phase, fault.entry) == (self.number, phase, self.entries[phase]):
                self._strike(fault)

    def record(self, fault: Fault) -> None:
        """Notes that it has struck."""
        with suppress(FileExistsError):
            os.mkdir(self.folder / f"{self.faults.index(fault)}.{FIRED}")  # takes no descriptor: none may be left

    def end_after(self, steps: int, undo: Callable[[], None]) -> None:
        self.endings.append((self.entries["step"] + steps, undo))

    def process(self, name: str) -> int:
        """pid of "rank 0", "rank 1", "launcher" (DeepSpeed's) or "supervisor" (`teamlora launch`)."""
        if name not in self.known:
            self.known[name] = self._find(name)
        return self.known[name]

    def _find(self, name: str) -> int:
        if name in RANKS:
            return int((self.folder / name).read_text())
        launcher = os.getppid()
        if name == "launcher":
            return launcher
        return int(Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[1])

    def _pass_step(self) -> None:
        for name in PROCESSES:  # now, as a fault may leave no descriptors to read them with
            self.process(name)
        for do in self.each_step:
            do()
        due = [undo for at, undo in self.endings if at <= self.entries["step"]]
        self.endings = [(at, undo) for at, undo in self.endings if at > self.entries["step"]]
        for undo in due:
            undo()

    def _strike(self, fault: Fault) -> None:
        if fault.delay:
            timer = threading.Timer(fault.delay, self.act, (fault, self))
            timer.daemon = True
            timer.start()
        else:
            self.act(fault, self)


def write_faults(folder: Path, faults: list[Fault]) -> None:
    folder.mkdir(parents=True)
    (folder / PLAN).write_text(json.dumps([asdict(fault) for fault in faults]))


def fired(folder: Path, faults: list[Fault]) -> list[Fault]:
    """Those of the faults that have struck."""
    return [fault for index, fault in enumerate(faults) if (folder / f"{index}.{FIRED}").exists()]


def arm() -> None:
    """Prepares this rank's faults. Nothing heavy is imported before the command handles signals, as without faults."""
    import trainer.recipe_file
    from benchmarks.soak.kinds import act
    from data_prep.publish import write_atomically

    folder = Path(os.environ[FOLDER])
    faults = [Fault(**each) for each in json.loads((folder / PLAN).read_text())]
    rank = Rank(int(os.environ["RANK"]), folder, Path.cwd(), faults, act)
    write_atomically(folder / RANKS[rank.number], str(os.getpid()))
    real = trainer.recipe_file.load_recipe

    def load_recipe(*arguments: Any) -> Any:
        rank.enter(IMPORTS)
        _hook_phases(rank)
        return real(*arguments)

    trainer.recipe_file.load_recipe = load_recipe


def _hook_phases(rank: Rank) -> None:
    for phase in {fault.phase for fault in rank.faults} | {"step"}:
        if phase == IMPORTS:
            continue
        module, name = PHASES[phase]
        *owner, attribute = name.split(".")
        holder = functools.reduce(getattr, owner, importlib.import_module(module))
        setattr(holder, attribute, _hooked(getattr(holder, attribute), phase, rank))


def _hooked(real: Callable[..., Any], phase: str, rank: Rank) -> Callable[..., Any]:
    @functools.wraps(real)
    def call(*arguments: Any, **options: Any) -> Any:
        rank.enter(phase)
        return real(*arguments, **options)

    return call
