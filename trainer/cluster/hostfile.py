"""The hostfile: the machines that a launch uses and the number of ranks on each, in DeepSpeed's format."""

import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.user_error import UserError

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[1-9]\d*)")


@dataclass(frozen=True)
class Node:
    """A machine by its ssh name. slots: its ranks, one per GPU, or processes on its CPUs."""

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Node, ...]:
    """Reads the nodes in the file's order, which is the order of ranks.

    One line per node, `name slots=N`; empty lines and comments (#) are ignored. Raises UserError if the file cannot be
    read, has any other line, lists no node or lists one twice. (DeepSpeed's launcher takes a missing file to mean "this
    machine only".)
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"hostfile={path}: {reason}; give a file with one line per node, such as `node-a slots=8`"
        ) from None
    nodes: dict[str, Node] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise UserError(f"hostfile={path}, line {number}: {text!r}: expected `name slots=N`, N at least 1")
        name = match["name"]
        if name in nodes:
            raise UserError(f"hostfile={path}, line {number}: {name} is listed twice; use one line with all its slots")
        nodes[name] = Node(name, int(match["slots"]))
    if not nodes:
        raise UserError(f"hostfile={path}: lists no nodes; write one line per node, such as `node-a slots=8`")
    return tuple(nodes.values())
