"""Forms of words: past tenses, translations, numbers in words."""

import functools
import json
import random
import re
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from data_prep.suite.rows import Row, in_random_order
from data_prep.suite.wordnet import first_senses

_LANGUAGES = {"de": "German", "es": "Spanish", "fr": "French", "pt": "Portuguese"}
_SHARE_OF_REGULAR = 0.4
_WRONG_CHOICES = 3
_NUMBERS = range(13, 1000)


def past_tense(rng: random.Random) -> Iterator[Row]:
    """The past tense of a verb that is in use according to WordNet and has only one past tense.

    While they last, six in ten are irregular or change their spelling.
    """
    import lemminflect

    changed: list[tuple[str, str]] = []
    regular: list[tuple[str, str]] = []
    for verb, sense in first_senses("verb").items():
        found = lemminflect.getAllInflections(verb, upos="VERB") if sense.uses else {}
        forms = found.get("VBD", ())
        if len(forms) == 1 and re.fullmatch("[a-z]+", verb) and forms[0] != verb:
            (regular if forms[0] in (f"{verb}d", f"{verb}ed") else changed).append((verb, forms[0]))
    changed, regular = in_random_order(changed, rng), in_random_order(regular, rng)
    while changed or regular:
        of = regular if regular and (not changed or rng.random() < _SHARE_OF_REGULAR) else changed
        verb, past = of.pop()
        yield Row(verb, f"What is the past tense of the verb {verb}?", past)


def translations(rng: random.Random) -> Iterator[Row]:
    """The English word, out of four, for a thing, animal or person in one of four languages; from names of emoji."""
    names = {language: _names_of_emoji(language) for language in _LANGUAGES}
    english_words = sorted({*_names_of_emoji("en").values()})
    for emoji, english in in_random_order(_names_of_emoji("en").items(), rng):
        language = rng.choice(list(_LANGUAGES))
        foreign = names[language].get(emoji)
        if foreign is not None and english not in foreign:
            wrong = rng.sample([word for word in english_words if word != english], _WRONG_CHOICES)
            choices = tuple(in_random_order([english, *wrong], rng))
            yield Row(english, f"What is this {_LANGUAGES[language]} word in English: {foreign}?", english, choices)


def number_words(rng: random.Random) -> Iterator[Row]:
    """A number from 13 to 999 in words, in one of four languages."""
    from num2words import num2words

    for number in in_random_order(_NUMBERS, rng):
        language = rng.choice(list(_LANGUAGES))
        question = f"Write the number {number} in {_LANGUAGES[language]} words."
        yield Row(str(number), question, num2words(number, lang=language))


@functools.cache
def _names_of_emoji(language: str) -> dict[str, str]:
    """One-word names by emoji, without skin and hair variants."""
    name = "emoji" if language == "en" else f"emoji_{language}"
    path = distribution("emoji").locate_file(f"emoji/unicode_codes/{name}.json")
    names = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    found = {}
    for emoji, value in sorted(names.items()):
        word = (value[language] if isinstance(value, dict) else value).strip(":").lower()
        if re.fullmatch(r"[^\W\d_]+", word):
            found[emoji] = word
    return found
