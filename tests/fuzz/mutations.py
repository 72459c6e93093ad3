"""Hypothesis strategies that damage trees of values and texts, as people and disks do."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from datetime import date, datetime
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]

NUMBERS = [
    0, -1, 1, 2, 3, 1.5, 0.5, -0.0, 1e-308, 1e308, -1e308, 10**12, 10**20, 2**31, 2**63, 2**64, 10**400, 1e-9,
    float("inf"), float("nan"),
]  # fmt: skip
TEXTS = [
    "", " ", "auto", "none", "null", "true", "no", "1:30", "010", "12", "1e5", "nan", "a\0b", "a\nb", "a\u2028b",
    "a\x85b", "\ud83d\ude00", "~", "~nobody/x", "..", "/", "*", "x" * 5000, "2026-01-01", "{question}", "\x1b[31m",
    "\ufeff", "<<", "=",
]  # fmt: skip


def scalars(*more: Any) -> st.SearchStrategy[Any]:
    """Values of every kind that a text of JSON or YAML may hold."""
    return st.one_of(
        st.sampled_from([*NUMBERS, *TEXTS, None, True, False, *more]),
        st.integers(),
        st.floats(),
        st.text(st.characters(codec="utf-8"), max_size=8),
    )


def values(*more: Any) -> st.SearchStrategy[Any]:
    """Scalars, and lists and mappings of them."""
    return st.recursive(
        scalars(*more),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.-_", max_size=3), inner, max_size=3),
        max_leaves=5,
    )


YAML_SCALARS = (date(2026, 1, 1), datetime(2026, 1, 1, 12), b"\xff\0", {1, 2})


@st.composite
def mutated_trees(draw: st.DrawFn, bases: Sequence[Any], odd: st.SearchStrategy[Any]) -> Any:
    """One of the bases after a few changes at places of its own: replaced, removed, renamed, added.

    What is drawn is copied: a later change within it would change what hypothesis draws from.
    """
    tree = deepcopy(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            break
        *parents, last = draw(st.sampled_from(places))
        holder = at(tree, parents)
        match draw(st.sampled_from(["replace"] * 6 + ["remove", "rename", "add", "swap"])):
            case "replace":
                holder[last] = deepcopy(draw(odd))
            case "remove":
                del holder[last]
            case "rename" if isinstance(holder, dict):
                holder[draw(_misspelled(str(last)))] = holder.pop(last)
            case "add" if isinstance(holder, dict):
                holder[draw(st.text("abc_ .", max_size=4))] = deepcopy(draw(odd))
            case "swap":
                holder[last] = deepcopy(at(tree, draw(st.sampled_from(places))))
            case _:
                holder[last] = [holder[last]]
    return tree


def at(tree: Any, path: Sequence[str | int]) -> Any:
    """The value at a path."""
    for part in path:
        tree = tree[part]
    return tree


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, value) of everything that is no list or mapping."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from leaves(value, (*path, key))


def _places(tree: Any, path: Path = ()) -> Iterator[Path]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


@st.composite
def _misspelled(draw: st.DrawFn, name: str) -> str:
    where = draw(st.integers(0, len(name)))
    return draw(st.sampled_from([name[:where] + name[where + 1 :], f"{name[:where]}x{name[where:]}", name.upper()]))


@st.composite
def mutated_texts(draw: st.DrawFn, bases: Sequence[str], fragments: Sequence[str]) -> str:
    """One of the bases with lines removed, repeated, moved or cut, values replaced, or fragments put in."""
    text = draw(st.sampled_from(bases))
    for _ in range(draw(st.integers(1, 3))):
        lines = text.splitlines(keepends=True) or [""]
        here, there = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        line, fragment = lines[here], draw(st.sampled_from(fragments))
        column = draw(st.integers(0, len(line)))
        match draw(st.sampled_from(["value"] * 4 + ["insert", "line", "remove", "repeat", "move", "cut", "indent"])):
            case "value":
                lines[here] = f"{line.partition(':')[0]}: {fragment}\n"
            case "insert":
                lines[here] = line[:column] + fragment + line[column:]
            case "line":
                lines.insert(here, f"{fragment}\n")
            case "remove":
                del lines[here]
            case "repeat":
                lines.insert(there, line)
            case "move":
                lines.insert(there, lines.pop(here))
            case "cut":
                lines[here] = line[:column]
            case "indent":
                lines[here] = " " * draw(st.integers(1, 4)) + line
        text = "".join(lines)
    return text


@st.composite
def mutated_bytes(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> bytes:
    """A text as a file: mostly UTF-8, at times in another encoding, cut short, or with a changed byte."""
    text = draw(texts)
    encoding = draw(st.sampled_from(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "latin-1"]))
    content = text.encode(encoding, "replace")
    match draw(st.sampled_from(["whole"] * 12 + ["cut", "changed", "windows"])):
        case "cut":
            content = content[: draw(st.integers(0, len(content)))]
        case "changed" if content:
            where = draw(st.integers(0, len(content) - 1))
            content = content[:where] + bytes([draw(st.integers(0, 255))]) + content[where + 1 :]
        case "windows":
            content = content.replace(b"\n", b"\r\n")
    return content
