"""What a seed stands for: with or without placement, and the faults of each start of one run."""

import random
from dataclasses import dataclass

from benchmarks.soak.kinds import AT_REST, BOTH, KINDS, OWN_DISK_AT_REST, Kind
from benchmarks.soak.phases import IMPORTS, ON_BOTH_RANKS, PROCESSES, Fault

STARTS = (4, 7)  # of a run that ends with faults; one without follows
MOST_ENTRIES = {"step": 6, "rows read": 6, "backward": 6, "metrics": 6, "save": 4, "pointer": 2, "prune": 2}
SHORT_DELAY = 0.05  # seconds: within the phase, or shortly after it
REST_CHANCE = 0.15  # that files are harmed between two starts, by kind


@dataclass(frozen=True)
class Start:
    """faults: while it runs. before: names in AT_REST, of what happens to files first."""

    faults: list[Fault]
    before: list[str]


@dataclass(frozen=True)
class Plan:
    seed: int
    placed: bool
    starts: list[Start]


def is_placed(seed: int) -> bool:
    """Whether the run of a seed places its experts."""
    return bool(seed % 2)


def plan_run(seed: int, own_disk: bool, import_seconds: float) -> Plan:
    """The same for the same seed on machines of any pace, but for the moments of faults while imports run.

    own_disk: whether a small disk can be mounted. import_seconds: that a rank takes for imports here.
    """
    chance = random.Random(seed)
    placed = is_placed(seed)
    count = chance.randint(*STARTS)
    starts = [_start(chance, placed, own_disk, import_seconds, last=index == count) for index in range(count + 1)]
    starts[0].before.clear()  # there are no files yet
    return Plan(seed, placed, [*starts, Start([], [])])  # a disk that fills may have ended the last one too


def _start(chance: random.Random, placed: bool, own_disk: bool, import_seconds: float, last: bool) -> Start:
    kinds = {
        name: kind
        for name, kind in KINDS.items()
        if (placed or not kind.placed_only) and (own_disk or not kind.own_disk)
    }
    enders = {name: kind for name, kind in kinds.items() if kind.ends}
    others = {name: kind for name, kind in kinds.items() if not kind.ends}
    names = [_weighted(chance, others) for _ in range(chance.randint(0, 3))]
    names += [] if last else [_weighted(chance, enders)]
    names = [name for name in names if KINDS[name].alone] or names
    if "no more files" in names:  # then this process cannot replace any either
        names = [name for name in names if not KINDS[name].refused]
    faults = [_fault(chance, name, KINDS[name], import_seconds) for name in dict.fromkeys(names)]
    before = [name for name in AT_REST if chance.random() < REST_CHANCE and (own_disk or name not in OWN_DISK_AT_REST)]
    return Start(faults, before)


def _weighted(chance: random.Random, kinds: dict[str, Kind]) -> str:
    return chance.choices(list(kinds), [kind.weight for kind in kinds.values()])[0]


def _fault(chance: random.Random, name: str, kind: Kind, import_seconds: float) -> Fault:
    phase = chance.choice(kind.phases)
    victim = chance.choice(kind.victims) if kind.victims else ""
    delay = 0.0
    if victim in (*PROCESSES, BOTH):  # others do something in the rank that enters the phase, there and then
        delay = chance.random() * (import_seconds if phase == IMPORTS else SHORT_DELAY * chance.randrange(2))
    return Fault(
        kind=name,
        phase=phase,
        rank=chance.randrange(2) if phase in ON_BOTH_RANKS else 0,
        entry=chance.randint(1, MOST_ENTRIES.get(phase, 1)),
        delay=delay,
        victim=victim,
        lasting=chance.randint(*kind.lasting),
    )
