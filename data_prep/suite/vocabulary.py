"""Meanings of English words from WordNet: hypernyms, definitions, antonyms."""

import random
import re
from collections import Counter
from collections.abc import Iterator

from data_prep.suite.rows import Row, in_random_order
from data_prep.suite.wordnet import Sense, Synset, first_senses, synsets

_KINDS = {  # kind, and the word whose first meaning in WordNet is that kind: that of drink is a gulp
    **{kind: kind for kind in (
        "bird", "book", "building", "color", "container", "crime", "disease", "emotion", "fabric", "fish", "flower",
        "fruit", "furniture", "game", "garment", "insect", "machine", "mammal", "metal", "mineral", "reptile", "room",
        "science", "shop", "sport", "tool", "tree", "vegetable", "vehicle", "weapon",
    )},
    "drink": "beverage",
    "musical instrument": "musical_instrument",
}  # fmt: skip
_MOST_OF_A_KIND = 30
_WRONG_CHOICES = 3
_MOST_WORDS = 10  # in a definition
_FAMILIAR = 1  # least uses of a word to ask about


def hypernyms(rng: random.Random) -> Iterator[Row]:
    """The kind of thing that a word names, out of four kinds, for words that belong to one kind only."""
    seen = Counter[str]()
    for word, sense in in_random_order(_familiar_words(first_senses("noun")), rng):
        kinds = _kinds_of(sense.offset)
        if len(kinds) != 1 or kinds[0] in word or seen[kinds[0]] == _MOST_OF_A_KIND:
            continue
        seen[kinds[0]] += 1
        wrong = rng.sample([kind for kind in _KINDS if kind not in kinds], _WRONG_CHOICES)
        choices = tuple(in_random_order([*kinds, *wrong], rng))
        yield Row(sense.offset, f"What kind of thing is this: {word}?", kinds[0], choices)


def definitions(rng: random.Random) -> Iterator[Row]:
    """Short definitions of nouns, without the noun itself, and of no noun that hypernyms asks about."""
    nouns = synsets("noun")
    for word, sense in in_random_order(_familiar_words(first_senses("noun")), rng):
        definition = _short_definition(nouns[sense.offset])
        if definition is not None and word not in definition and not _kinds_of(sense.offset):
            yield Row(sense.offset, f"What is the meaning of this word: {word}?", definition)


def antonyms(rng: random.Random) -> Iterator[Row]:
    """The opposite of an adjective. Each word occurs in one pair only, as question or as answer."""
    used: set[str] = set()
    pairs = []
    for pair in _opposites():
        if used.isdisjoint(pair):
            used.update(pair)
            pairs.append(pair)
    for pair in in_random_order(pairs, rng):
        asked, answer = in_random_order(pair, rng)
        if answer in asked:  # unhappy would give happy away
            asked, answer = answer, asked
        yield Row(" ".join(sorted(pair)), f"What is the opposite of {asked}?", answer)


def _familiar_words(senses: dict[str, Sense]) -> list[tuple[str, Sense]]:
    return [
        (word, sense) for word, sense in senses.items() if sense.uses >= _FAMILIAR and re.fullmatch("[a-z]{3,14}", word)
    ]


def _kinds_of(offset: str) -> list[str]:
    """The kinds that a meaning belongs to, directly or indirectly."""
    senses, nouns = first_senses("noun"), synsets("noun")
    above: set[str] = set()
    todo = [offset]
    while todo:
        new = [other for other in nouns[todo.pop()].hypernyms if other not in above]
        above.update(new)
        todo += new
    return [kind for kind, word in _KINDS.items() if senses[word].offset in above]


def _short_definition(synset: Synset) -> str | None:
    """The gloss up to its first semicolon; None if that is too long, too short, or more than plain words."""
    definition = synset.gloss.partition(";")[0].strip()
    is_plain = re.fullmatch("[a-zA-Z' ,-]+", definition)
    return definition if is_plain and 3 <= len(definition.split()) <= _MOST_WORDS else None


def _opposites() -> list[tuple[str, str]]:
    """Pairs of adjectives that are opposites in their first meaning, the most used first."""
    senses, adjectives = first_senses("adjective"), synsets("adjective")
    pairs = []
    for word, sense in _familiar_words(senses):
        for own, offset, number in adjectives[sense.offset].antonyms:
            other = adjectives[offset].words[int(number) - 1]
            is_first = other in senses and senses[other].offset == offset
            if own == word and is_first and re.fullmatch("[a-z]{3,14}", other):
                pairs.append((sense.uses + senses[other].uses, word, other))
    return [(word, other) for _, word, other in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))]
