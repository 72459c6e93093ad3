"""Elements of a JSON array, one after the other, from a window that moves over the file."""

import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_prep.sources.blocks import Row
from data_prep.user_error import UserError

DEEPEST = 100  # nested lists and objects

_CHUNK = 2**20  # characters read at once
_LARGEST = 2**28  # characters of one element
_BLANKS = " \t\r\n"  # in JSON
_SEPARATOR = re.compile(f"[{_BLANKS}]*,?[{_BLANKS}]*")
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)  # a lone quote: no closing one
_decode = json.JSONDecoder(strict=False).raw_decode


def read_json_array(file: BinaryIO, path: str) -> Iterator[Row]:
    """Lists and objects of one array as bytes, numbered from 0, few in memory at a time; parse_object reads them.

    An element that is not JSON ends where its brackets balance. Raises UserError for anything else in or after the
    array, since nothing then shows where the next element begins.
    """
    window = _Window(file, path)
    window.before_bracket()
    window.at = window.text.index("[", window.at) + 1
    for count in itertools.count():
        place = f"{path}[{count}]"
        end = window.separator_end()
        separator, bracket = window.text[window.at : end].strip(_BLANKS), window.text[end : end + 1]
        if bracket == "]" and not separator:
            break
        if bracket not in ("[", "{") or separator != ("," if count else ""):
            raise _no_element(window, place, "a comma and an object" if count else "an object")
        window.at = end
        yield count, window.take_element(place)
    window.at = end + 1
    rest, bracket = window.before_bracket()
    if rest := rest.strip(_BLANKS) + bracket:
        raise UserError(f"{path}: found {_shown(rest)} after the end of the array; remove it")


class _Window:
    """A stretch of a file's text. Bytes that are not UTF-8 are lone surrogates in it; encoding restores them."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="\n")
        self._path = path
        self.text = ""
        self.at = 0  # text before this place is no longer needed

    def separator_end(self) -> int:
        """Where blanks from `at` on end, with one comma between them at most."""
        while True:
            found = _SEPARATOR.match(self.text, self.at)
            end = found.end() if found else self.at
            if end < len(self.text) or not self._read_on():
                return end

    def before_bracket(self) -> tuple[str, str]:
        """Text from `at` to the next bracket outside of strings, and that bracket; without one, all text and ""."""
        while True:
            for found in _STRING_OR_BRACKET.finditer(self.text, self.at):
                if found[0] in ("[", "]", "{", "}"):
                    return self.text[self.at : found.start()], found[0]
                if found[0] == '"':
                    break
            if not self._read_on():
                return self.text[self.at :], ""

    def take_element(self, place: str) -> bytes:
        """The list or object that begins at `at`; moves past it."""
        while (end := _end_of_element(self.text, self.at, place)) is None:
            if not self._read_on():
                raise _no_end(place)
        element = self.text[self.at : end].encode(errors="surrogateescape")
        self.at = end
        return element

    def _read_on(self) -> bool:
        """Reads a chunk, or as much as is unread, so that long elements are rarely scanned again; False at the end.

        Raises UserError for an element that is too long.
        """
        needed = self.text[self.at :]
        if len(needed) > _LARGEST:
            raise UserError(
                f"{self._path}: over {_LARGEST >> 20} MiB in one element of an array; look for a missing quote"
            )
        more = self._file.read(max(_CHUNK, len(needed)))
        self.text, self.at = needed + more, 0
        return bool(more)


def _end_of_element(text: str, start: int, place: str) -> int | None:
    """One past the list or object at `start`; None if the text ends before it."""
    try:
        value, end = _decode(text, start)
        if text.count("[", start, end) + text.count("{", start, end) <= DEEPEST or _depth(value) <= DEEPEST:
            return end
    except (ValueError, RecursionError):  # cut off, damaged, a huge number, or too deep
        pass
    return _end_by_brackets(text, start, place)


def _depth(value: Any) -> int:
    """The number of nested lists and objects in a JSON value."""
    depth, level = 0, [value]
    while level:
        depth += 1
        parts = itertools.chain.from_iterable(each.values() if isinstance(each, dict) else each for each in level)
        level = [part for part in parts if isinstance(part, dict | list)]
    return depth


def _end_by_brackets(text: str, start: int, place: str) -> int | None:
    """The same, for any text. Raises UserError for one that is nested too deep."""
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text, start):
        token = found[0]
        if token == '"':
            return None
        if token in ("[", "{"):
            depth += 1
        elif token in ("]", "}"):
            depth -= 1
        if depth > DEEPEST:
            raise UserError(f"{place}: over {DEEPEST} nested lists and objects; simplify it")
        if not depth:
            return found.end()
    return None


def _no_element(window: _Window, place: str, expected: str) -> UserError:
    before, bracket = window.before_bracket()
    if not bracket:
        return _no_end(place)
    found = _shown(before.strip(_BLANKS) + bracket)
    return UserError(f"{place}: found {found} in place of {expected}; expected one array of JSON objects, correct it")


def _no_end(place: str) -> UserError:
    return UserError(f"{place}: the array has no end; the file is cut off or a quote is missing")


def _shown(text: str) -> str:
    start = text[:40].encode(errors="surrogateescape").decode(errors="replace")
    return repr(start + "..." if len(text) > 40 else start)
