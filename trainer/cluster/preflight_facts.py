"""What the machines of a launch told, and a line of the report that is made of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from trainer.cluster.hostfile import Node
from trainer.cluster.probe import Facts
from trainer.cluster.probe_client import Answer
from trainer.recipe import Recipe

ALL = "all"


@dataclass(frozen=True)
class Finding:
    """One line of the report. host: a name as in the hostfile, or ALL."""

    level: Literal["ok", "warning", "error"]
    host: str
    what: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Need:
    """Bytes of one rank's memory, and of the run's disk, as they are estimated."""

    device: int
    host: int
    disk: int


@dataclass(frozen=True)
class ClusterFacts:
    """All that findings are made of.

    answers: of the nodes, in their order. here: of the launching machine, where that is no node. need: None where it
    was not estimated.
    """

    recipe: Recipe
    nodes: Sequence[Node]
    answers: Sequence[Answer]
    here: Answer | None = None
    need: Need | None = None

    @cached_property
    def facts(self) -> dict[str, Facts]:
        """Of the nodes that answered, by name."""
        return {answer.host: answer.facts for answer in self.answers if answer.facts is not None}

    @cached_property
    def slots(self) -> dict[str, int]:
        return {node.name: node.slots for node in self.nodes}

    @property
    def everywhere(self) -> dict[str, Facts]:
        """Those of the launching machine too, which come first."""
        here = {self.here.host: self.here.facts} if self.here is not None and self.here.facts is not None else {}
        return here | self.facts
