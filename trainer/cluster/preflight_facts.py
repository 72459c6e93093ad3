"""What a preflight check works on and yields: facts of all machines, estimated needs, findings."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from trainer.cluster.hostfile import Node
from trainer.cluster.probe import Facts
from trainer.cluster.probe_client import Answer
from trainer.recipe import Recipe

ALL = "all"
GIB = 2**30

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. host: a name from the hostfile, or ALL. what: the check."""

    level: Level
    host: str
    what: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Need:
    """Estimated bytes of memory per rank, on device and host, and of disk for the run."""

    device: int
    host: int
    disk: int


@dataclass(frozen=True)
class ClusterFacts:
    """The input of all checks.

    answers: of the nodes, in their order. here: of the launching machine if it is not a node. need: None if it was not
    estimated.
    """

    recipe: Recipe
    nodes: Sequence[Node]
    answers: Sequence[Answer]
    here: Answer | None = None
    need: Need | None = None

    @cached_property
    def facts(self) -> dict[str, Facts]:
        """{name: facts} of the nodes that answered."""
        return {answer.host: answer.facts for answer in self.answers if answer.facts is not None}

    @cached_property
    def slots(self) -> dict[str, int]:
        return {node.name: node.slots for node in self.nodes}

    @property
    def ranks(self) -> int:
        return sum(self.slots.values())

    @property
    def first(self) -> Facts | None:
        """Facts of the first node, which has rank 0."""
        return self.facts.get(self.nodes[0].name)

    @property
    def everywhere(self) -> dict[str, Facts]:
        """`facts`, preceded by those of the launching machine."""
        here = {self.here.host: self.here.facts} if self.here is not None and self.here.facts is not None else {}
        return here | self.facts


def counted(number: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def gib(size: int) -> str:
    """Bytes as GiB with two decimals."""
    return f"{size / GIB:.2f} GiB"
