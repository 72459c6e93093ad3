"""Scores of one given answer, from 0 to 1, and which of them a task is judged by."""

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
    """By task the metric that it is judged by: its source's (data_prep.items), else by likelihood where every item of
    it has choices, else exact match."""
    found: dict[str, str] = {}
    for item in items:
        own = item.get("metric") or (CHOICES if item.get("choices") else EXACT_MATCH)
        found[item["task"]] = own if found.get(item["task"], own) == own else EXACT_MATCH
    return found


def exact_match(given: str, wanted: str) -> float:
    """1 where the two are the same but for reasoning, outer white space and one full stop at the end."""
    return float(normalised(given) == normalised(wanted))


def normalised(text: str) -> str:
    return _without_reasoning(text).strip().removesuffix(".").rstrip()


def _without_reasoning(text: str) -> str:
    return text.rpartition(END_OF_REASONING)[2]


def token_f1(given: str, wanted: str) -> float:
    """SQuAD's F1 of words, as often as they come: in lower case, without punctuation and English articles."""
    words, expected = _words(given), _words(wanted)
    if not words or not expected:
        return float(words == expected)
    common = (Counter(words) & Counter(expected)).total()
    return 2 * common / (len(words) + len(expected))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", _without_reasoning(text).lower().translate(_PUNCTUATION)).split()


def rouge_l(given: str, wanted: str) -> float:
    """ROUGE-L's F-measure by the package rouge-score, with words of any script that puts blanks or the like between
    them; each sign of the others, such as Chinese and Thai, is a word."""
    return _rouge().score(_without_reasoning(wanted), _without_reasoning(given))["rougeL"].fmeasure


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_AnyScript())


class _AnyScript:
    """rouge-score's own tokenizer knows the letters a to z only. Combining marks, such as Hindi's vowels, stay."""

    def tokenize(self, text: str) -> list[str]:
        apart = signs_apart(text.lower())
        return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in apart).split()


TEXT_METRICS = {EXACT_MATCH: exact_match, TOKEN_F1: token_f1, ROUGE_L: rouge_l}
"""The metrics that compare a written answer with the wanted one."""


def likeliest(log_likelihoods: Sequence[float]) -> int:
    """The choice that the model finds likeliest: by the sum over its tokens, as lm-eval's `acc` does."""
    return max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)


def likeliest_by_length(log_likelihoods: Sequence[float], choices: Sequence[str]) -> int:
    """The same by the sum over the choice's length in characters, as lm-eval's `acc_norm` does."""
    return likeliest([total / len(text) for total, text in zip(log_likelihoods, choices, strict=True)])
