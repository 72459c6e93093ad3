"""How a JSON file holds its records: one per line, in an array, in an array within an object, or one after another."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, get_args

from data_prep.config import FieldName
from data_prep.sources.blocks import Row
from data_prep.sources.json_array import Window, elements, read_json_array
from data_prep.sources.text import is_turn, read_json_lines
from data_prep.user_error import UserError

_FIELDS = frozenset(get_args(FieldName))
_MOST_OF_KEYS = 2**20  # characters; the keys are kept
_COLUMNS = "features"  # a list of objects beside the rows, in what the Hub's viewer sends


@dataclass(frozen=True)
class Layout:
    kind: Literal["lines", "array", "object", "series"]  # series: values over several lines each, one after another
    key: str = ""  # of the array within the object
    unread: tuple[str, ...] = ()  # what stands beside that array, such as "key license beside data"

    @property
    def by_line(self) -> bool:
        """Whether rows are numbered by line."""
        return self.kind in ("lines", "series")


def find_layout(file: BinaryIO, path: str, fields: Collection[str]) -> Layout:
    """Finds the layout from the first value of a file, with few records in memory at a time.

    fields: the source's own names for known fields. An object with a known field is a record, whatever lists it holds.
    What is damaged counts as lines: their errors name the line. Raises UserError for an object with several lists of
    records.
    """
    window = Window(file, path)
    lists: list[str] = []
    keys: list[str] = []
    try:
        first = window.next_character()
        start = window.line
        if first == "[":
            if not _is_list_of_turns(window, path, fields):
                return Layout("array")
        elif first == "{":
            lists = _lists_of_records(window, path, _FIELDS.union(fields), keys)
        else:
            return Layout("lines")
        kind: Literal["lines", "series"] = "lines" if window.line == start else "series"
        if not lists or window.next_character():
            return Layout(kind)
    except (UserError, ValueError, RecursionError):  # damaged
        return Layout("lines")
    if len(lists) > 1:
        raise UserError(
            f"{path}: one object with several lists of records ({', '.join(lists)}); expected one list, save each as a "
            "file of its own"
        )
    return Layout("object", lists[0], tuple(f"key {key} beside {lists[0]}" for key in keys if key != lists[0]))


def read_layout(layout: Layout, file: BinaryIO, path: str) -> Iterator[Row]:
    """The rows of a file as bytes, few in memory at a time; parse_object reads them."""
    match layout.kind:
        case "lines":
            return read_json_lines(file, path)
        case "array":
            return read_json_array(file, path)
        case "object":
            return _read_object(Window(file, path), path, layout.key)
        case "series":
            return _read_series(Window(file, path), path)


def _is_list_of_turns(window: Window, path: str, fields: Collection[str]) -> bool:
    """Whether the list at the window's place is one conversation, not an array of records; if so, moves past it."""
    window.at += 1
    rows = elements(window, path)
    try:
        first = json.loads(next(rows, (0, b"null"))[1])
    except (UserError, ValueError, RecursionError):  # the array's reader says why
        return False
    if not is_turn(first) or not first.keys().isdisjoint(fields):
        return False
    for _ in rows:
        pass
    return True


def _lists_of_records(window: Window, path: str, known: Collection[str], keys: list[str]) -> list[str]:
    """Keys of the lists of records in the object at the window's place, none if it is a record; moves past it.

    Adds all keys of the object to `keys`.
    """
    lists, is_record = [], False
    for key in _keys(window, path):
        keys.append(key)
        is_record |= key in known
        if window.next_character() != "[":
            window.skip_value(path)
        elif _is_list_of_records(window, path):
            lists.append(key)
    if len(lists) > 1 and _COLUMNS in lists:
        lists.remove(_COLUMNS)
    return [] if is_record else lists


def _is_list_of_records(window: Window, path: str) -> bool:
    """Whether the list at the window's place holds records or conversations; moves past it."""
    window.at += 1
    if window.next_character() not in ("[", "{"):
        while window.next_character() != "]":
            window.skip_value(path)
            window.skip_comma()
        window.at += 1
        return False
    rows = elements(window, path)
    first = json.loads(next(rows)[1])
    for _ in rows:
        pass
    return bool(first) and all(map(is_turn, first)) if isinstance(first, list) else not is_turn(first)


def _keys(window: Window, path: str) -> Iterator[str]:
    """Keys of the object at the window's place. The caller moves past the value of each; moves past the object."""
    window.at += 1
    room = _MOST_OF_KEYS
    while window.next_character() != "}":
        key = window.take_key(path)
        if (room := room - len(key) - 1) < 0:
            raise UserError(f"{path}: over {_MOST_OF_KEYS >> 20} MiB of keys in one object; expected a list of records")
        yield key
        window.skip_comma()
    window.at += 1


def _read_object(window: Window, path: str, wanted: str) -> Iterator[Row]:
    window.next_character()
    for key in _keys(window, path):
        if key == wanted:
            window.next_character()
            window.at += 1
            yield from elements(window, path)
            return
        window.skip_value(path)


def _read_series(window: Window, path: str) -> Iterator[Row]:
    """Objects and lists, numbered by the line on which each begins."""
    while character := window.next_character():
        number = window.line
        if character not in ("[", "{"):
            raise UserError(
                f"{path}:{number}: found {character!r} in place of an object; expected objects only, correct it"
            )
        yield number, window.take_element(f"{path}:{number}", "object")
