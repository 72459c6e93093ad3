"""The hostfile: the machines that a launch uses and the number of ranks on each, in DeepSpeed's format."""

import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.user_error import UserError

# no name begins with -: ssh would take it for an option, such as -F, whose file can name a command
_LINE = re.compile(r"(?P<name>[^\s=,\0-][^\s=,\0]*)\s+(?P<options>\S.*)")
_OPTION = re.compile(r"([\w-]+)\s*=\s*(\d{1,6})(?:\s+|$)", re.ASCII)


@dataclass(frozen=True)
class Node:
    """A machine by its ssh name. slots: its ranks, one per GPU, or processes on its CPUs."""

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Node, ...]:
    """Reads the nodes in the file's order, which is the order of ranks.

    One line per node, `name slots=N`; empty lines and comments (#) are ignored, and so is max_slots, which Open MPI's
    hostfiles have. Raises UserError if the file cannot be read, has any other line, lists no node or lists one twice.
    (DeepSpeed's launcher takes a missing file to mean "this machine only".)
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"hostfile={path}: {reason}; give a file with one line per node, such as `node-a slots=8`"
        ) from None
    nodes: dict[str, Node] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        node = _node(text)
        if node is None:
            raise UserError(f"hostfile={path}, line {number}: {text!r}: expected `name slots=N`, N at least 1")
        name = node.name.lower()  # host names do not differ by case
        if name in nodes:
            raise UserError(
                f"hostfile={path}, line {number}: {node.name} is listed twice, on line {line_of[name]} too; "
                "use one line with all its slots"
            )
        nodes[name], line_of[name] = node, number
    if not nodes:
        raise UserError(f"hostfile={path}: lists no nodes; write one line per node, such as `node-a slots=8`")
    return tuple(nodes.values())


def _node(text: str) -> Node | None:
    """The node of a line, or None if the line is not of the form `name slots=N`."""
    line = _LINE.fullmatch(text)
    if line is None or not re.fullmatch(f"({_OPTION.pattern})+", line["options"], re.ASCII):
        return None
    given = [(key.lower().replace("-", "_"), int(number)) for key, number in _OPTION.findall(line["options"])]
    options = dict(given)
    slots = options.get("slots", 0)
    known = len(options) == len(given) and options.keys() <= {"slots", "max_slots"}
    return Node(line["name"], slots) if known and 0 < slots <= options.get("max_slots", slots) else None
