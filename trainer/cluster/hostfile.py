"""The hostfile: which machines a launch uses and how many ranks each gets, in DeepSpeed's format."""

import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.user_error import UserError

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[1-9]\d*)")


@dataclass(frozen=True)
class Node:
    """A machine by the name that ssh knows, and its ranks: one a GPU, or processes on its CPUs."""

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Node, ...]:
    """The nodes in the file's order, which is that of the ranks.

    A line a node, `name slots=N`; empty lines and comments (#) are passed over. Raises UserError where the file cannot
    be read, says anything else, names no node or one twice. DeepSpeed's launcher takes a file that is missing for "this
    machine alone".
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"hostfile={path}: {reason}; give a file with a line such as `node-a slots=8` a node") from None
    nodes: dict[str, Node] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            raise UserError(f"hostfile={path}, line {number}: {text!r}: expected `name slots=N`, N at least 1")
        name = found["name"]
        if name in nodes:
            raise UserError(f"hostfile={path}, line {number}: {name} is listed twice; give it one line, with all slots")
        nodes[name] = Node(name, int(found["slots"]))
    if not nodes:
        raise UserError(f"hostfile={path}: lists no node; write a line such as `node-a slots=8` for each")
    return tuple(nodes.values())
