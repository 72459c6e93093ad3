"""Documents from reasoning-gym's seeded generators: one question and its answer each."""

import contextlib
import dataclasses
import difflib
import io
from typing import Any

from data_prep.config import QUESTION, ReasoningGymSource
from data_prep.documents import Document
from data_prep.errors import UserError


class Generator:
    """One of reasoning-gym's generators, as a source describes it.

    `key` is the recipe's key of the source, for errors. Raises UserError for an unknown generator and for options that
    the generator refuses, when set or when it generates.
    """

    def __init__(self, source: ReasoningGymSource, key: str) -> None:
        self._source, self._key = source, key
        self._entries = _build(source, key)

    def document(self, index: int, origin: str) -> Document:
        """Entry `index`, the same for the same seed and options; without an answer where the generator knows none."""
        question, answer = _entry(self._entries, index, self._source, self._key)
        messages = [
            {"role": "user", "content": self._source.prompt.replace(QUESTION, question)},
            {"role": "assistant", "content": answer},
        ]
        return Document(self._source.task, messages, origin, "reasoning-gym")


def _build(source: ReasoningGymSource, key: str) -> Any:
    from reasoning_gym.factory import DATASETS, create_dataset  # takes over a second

    if source.generator not in DATASETS:
        near = difflib.get_close_matches(source.generator, DATASETS, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else f"it has {', '.join(sorted(DATASETS))}"
        raise UserError(f"{key}.generator: {source.generator!r} is no reasoning-gym generator; {hint}")

    known = [field.name for field in dataclasses.fields(DATASETS[source.generator][1])]
    for option in source.options:
        if option not in known:
            choices = ", ".join(sorted(set(known) - {"seed", "size"}))
            raise UserError(f"{key}.options: {source.generator} has no option {option!r}; it has {choices}")
    try:
        return create_dataset(source.generator, size=source.count, seed=source.seed, **source.options)
    except Exception as error:  # generators check their options with whatever comes to hand, mostly bare asserts
        raise UserError(_refusal(source, key, "refuses its options", error)) from error


def _entry(generator: Any, index: int, source: ReasoningGymSource, key: str) -> tuple[str, str]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some generators print their progress
            entry = generator[index]
    except Exception as error:  # options that passed the check can still be impossible to satisfy
        raise UserError(_refusal(source, key, f"failed at entry {index}", error)) from error
    answer = entry["answer"]
    return entry["question"], "" if answer is None else str(answer)


def _refusal(source: ReasoningGymSource, key: str, what: str, error: Exception) -> str:
    cause = " ".join(str(error).split()) or type(error).__name__
    return f"{key}.options: {source.generator} {what} {source.options}: {cause}; correct the options"
