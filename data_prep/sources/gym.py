"""Documents from reasoning-gym's seeded generators: one question and its answer each.

Some generators go by the order of sets of texts, or by the random state of the whole process, whatever their seed is.
So all work in a process of their own, in which texts have the same hashes every time, and that state is set before each
entry. Of one, codeio, a few entries of a thousand differ all the same.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import os
import random
import signal
import subprocess
import sys
from typing import Any, BinaryIO

import numpy as np

from data_prep.config import QUESTION, ReasoningGymSource
from data_prep.documents import Document
from data_prep.user_error import UserError

_PROCESS = [sys.executable, "-m", "data_prep.sources.gym"]


class Generators:
    """The process of reasoning-gym's generators, which ends with this one; begun when it is first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def documents(self, source: ReasoningGymSource, key: str, origins: dict[int, str]) -> list[Document]:
        """The entries of those indices, with their origins; an entry is the same for the same seed and options, and has
        no answer where the generator knows none.

        `key` is the recipe's key of the source, for errors. Raises UserError for an unknown generator and for options
        that the generator refuses, when set or when it generates.
        """
        documents = []
        for origin, (question, answer) in zip(origins.values(), self._entries(source, key, [*origins]), strict=True):
            messages = [
                {"role": "user", "content": source.prompt.replace(QUESTION, question)},
                {"role": "assistant", "content": answer},
            ]
            documents.append(Document(source.task, messages, origin, "reasoning-gym"))
        return documents

    def _entries(self, source: ReasoningGymSource, key: str, indices: list[int]) -> list[tuple[str, str]]:
        self._process = self._process or _start()
        try:
            _send({"source": source.model_dump(mode="json"), "key": key, "indices": indices}, self._process.stdin)
            reply = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            raise UserError(
                f"{key}: the process of {source.generator} ended, most likely for want of memory; free some, or use "
                "fewer cores (taskset)"
            ) from error
        if "mistake" in reply:
            raise UserError(reply["mistake"])
        return reply["entries"]


def _start() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(_PROCESS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _send(message: dict[str, Any], stream: BinaryIO) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def _serve() -> None:
    """Replies to what `Generators` asks on the standard input, a line each, until that ends."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # with none to reply to it ends without a word
    built: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        source, key = ReasoningGymSource(**asked["source"]), asked["key"]
        described = json.dumps(asked["source"])
        try:
            if described not in built:
                built[described] = _build(source, key)
            reply = {"entries": [_entry(built[described], index, source, key) for index in asked["indices"]]}
        except UserError as error:
            reply = {"mistake": str(error)}
        _send(reply, sys.stdout.buffer)


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
    random.seed(source.seed + index)
    np.random.seed((source.seed + index) % 2**32)
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


if __name__ == "__main__":
    _serve()
