"""Elements of a JSON array, one after the other, from a window that moves over the file."""

import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_prep.sources.blocks import Row
from data_prep.sources.lines import LONGEST, TOO_LONG
from data_prep.user_error import UserError

DEEPEST = 100  # nested lists and objects

_CHUNK = 2**20  # characters read at once
_BLANKS = " \t\r\n"  # in JSON
_NO_BLANK = re.compile(f"[^{_BLANKS}]")
_SCALAR = re.compile(rf'[^{_BLANKS},:"\[\]{{}}]*')
_SEPARATOR = re.compile(f"[{_BLANKS}]*,?[{_BLANKS}]*")
_TEXT = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_STRING = re.compile(_TEXT, re.DOTALL)
_STRING_OR_BRACKET = re.compile(_TEXT + r'|["\[\]{}]', re.DOTALL)  # a lone quote: no closing one
_decode = json.JSONDecoder(strict=False).raw_decode


def read_json_array(file: BinaryIO, path: str) -> Iterator[Row]:
    """Lists and objects of one array as bytes, numbered from 0, few in memory at a time; parse_object reads them.

    An element that is not JSON ends where its brackets balance. Raises UserError for anything else in or after the
    array, since nothing then shows where the next element begins.
    """
    window = Window(file, path)
    window.next_character()
    window.at += 1
    yield from elements(window, path)
    rest, bracket = window.before_bracket()
    if rest := rest.strip(_BLANKS) + bracket:
        advice = "remove it" if bracket != "[" else "remove it, or write each line as an object"
        raise UserError(f"{path}: found {_shown(rest)} after the end of the array; {advice}")


def elements(window: "Window", path: str) -> Iterator[tuple[int, bytes]]:
    """The same for the array whose opening bracket the window has passed; moves past the array."""
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


class Window:
    """A stretch of a file's text. Bytes that are not UTF-8 are lone surrogates in it; encoding restores them."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="\n")
        self._path = path
        self.text = ""
        self.at = 0  # text before this place is no longer needed
        self._line, self._counted = 1, 0  # the line of the place up to which lines are counted

    @property
    def line(self) -> int:
        """The line of `at`, from 1."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def next_character(self) -> str:
        """Moves over blanks to the next character; "" at the end of the file."""
        while True:
            found = _NO_BLANK.search(self.text, self.at)
            self.at = found.start() if found else len(self.text)
            if found or not self._read_on():
                return self.text[self.at : self.at + 1]

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

    def take_key(self, place: str) -> str:
        """The key that begins at `at`; moves past it and its colon."""
        text = self._take_string(place)
        if self.next_character() != ":":
            raise UserError(f"{place}: no value for a key; correct it")
        self.at += 1
        return str(json.loads(text, strict=False))

    def skip_comma(self) -> None:
        """Moves past a comma, if one follows."""
        if self.next_character() == ",":
            self.at += 1

    def skip_value(self, place: str) -> None:
        """Moves past the value that follows."""
        character = self.next_character()
        if character in ("[", "{"):
            self.take_element(place)
        elif character == '"':
            self._take_string(place)
        else:
            while (found := _SCALAR.match(self.text, self.at)) and found.end() == len(self.text) and self._read_on():
                pass
            if not found or found.end() == self.at:
                raise UserError(f"{place}: a value is missing; correct it")
            self.at = found.end()

    def _take_string(self, place: str) -> str:
        if not self.text.startswith('"', self.at):
            raise UserError(f"{place}: a key is missing; correct it")
        while not (found := _STRING.match(self.text, self.at)):
            if not self._read_on():
                raise _no_end(place, "text")
        self.at = found.end()
        return found[0]

    def take_element(self, place: str, whole: str = "array") -> bytes:
        """The list or object that begins at `at`; moves past it. whole: what has no end if it has none."""
        while (end := _end_of_element(self.text, self.at, place)) is None:
            if not self._read_on():
                raise _no_end(place, whole)
        element = self.text[self.at : end].encode(errors="surrogateescape")
        self.at = end
        return element

    def _read_on(self) -> bool:
        """Reads a chunk, or as much as is unread, so that long elements are rarely scanned again; False at the end.

        Raises UserError for an element that is too long.
        """
        needed = self.text[self.at :]
        if len(needed) > LONGEST:
            raise UserError(f"{self._path}: {TOO_LONG}")
        more = self._file.read(max(_CHUNK, len(needed)))
        self._line += self.text.count("\n", self._counted, self.at)
        self.text, self.at, self._counted = needed + more, 0, 0
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


def _no_element(window: Window, place: str, expected: str) -> UserError:
    before, bracket = window.before_bracket()
    if not bracket:
        return _no_end(place)
    found = _shown(before.strip(_BLANKS) + bracket)
    return UserError(f"{place}: found {found} in place of {expected}; expected one array of JSON objects, correct it")


def _no_end(place: str, whole: str = "array") -> UserError:
    return UserError(f"{place}: the {whole} has no end; the file is cut off or a quote is missing")


def _shown(text: str) -> str:
    start = text[:40].encode(errors="surrogateescape").decode(errors="replace")
    return repr(start + "..." if len(text) > 40 else start)
