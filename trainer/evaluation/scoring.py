"""Scores of one answer, from 0 to 1, and the choice of each task's metric."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from data_prep.documents import END_OF_REASONING
from data_prep.word_splitting import signs_apart

EXACT_MATCH, CHOICES, TOKEN_F1, ROUGE_L = "exact_match", "choices", "token_f1", "rouge_l"

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def metrics_of(items: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Each task's metric: that of its source (data_prep.items), else CHOICES if all of its items have choices, else
    exact match."""
    found: dict[str, str] = {}
    for item in items:
        own = item.get("metric") or (CHOICES if item.get("choices") else EXACT_MATCH)
        found[item["task"]] = own if found.get(item["task"], own) == own else EXACT_MATCH
    return found


def exact_match(given: str, reference: str) -> float:
    """1 if both are equal, ignoring reasoning, surrounding white space and one final period."""
    return float(normalize(given) == normalize(reference))


def normalize(text: str) -> str:
    return _without_reasoning(text).strip().removesuffix(".").rstrip()


def _without_reasoning(text: str) -> str:
    return text.rpartition(END_OF_REASONING)[2]


def token_f1(given: str, reference: str) -> float:
    """SQuAD's F1 over the multisets of words: in lower case, without punctuation and English articles."""
    words, expected = _words(given), _words(reference)
    if not words or not expected:
        return float(words == expected)
    common = (Counter(words) & Counter(expected)).total()
    return 2 * common / (len(words) + len(expected))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", _without_reasoning(text).lower().translate(_PUNCTUATION)).split()


def rouge_l(given: str, reference: str) -> float:
    """ROUGE-L's F-measure by the package rouge-score, for any script. In scripts that do not separate words, such as
    Chinese and Thai, each character is a word."""
    return _rouge().score(_without_reasoning(reference), _without_reasoning(given))["rougeL"].fmeasure


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_AnyScript())


class _AnyScript:
    """Needed since rouge-score's own tokenizer keeps a to z only. Keeps combining marks, such as Hindi vowels."""

    def tokenize(self, text: str) -> list[str]:
        apart = signs_apart(text.lower())
        return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in apart).split()


TEXT_METRICS = {EXACT_MATCH: exact_match, TOKEN_F1: token_f1, ROUGE_L: rouge_l}
"""The metrics that compare a generated answer with the reference answer."""


def likeliest(log_likelihoods: Sequence[float]) -> int:
    """Index of the choice with the largest log-likelihood, as in lm-eval's `acc`."""
    return max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)


def likeliest_by_length(log_likelihoods: Sequence[float], choices: Sequence[str]) -> int:
    """Index of the choice with the largest log-likelihood per character, as in lm-eval's `acc_norm`."""
    return likeliest([total / len(text) for total, text in zip(log_likelihoods, choices, strict=True)])
