"""Documents from reasoning-gym's seeded generators, each with one question and its answer.

Some generators depend on the order of sets of strings or on the global random state, whatever their seed is. So they
run in a separate process with a fixed string hash seed, and the random state is set before each entry. Of the generator
codeio, a few entries in a thousand still differ between runs.
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
from typing import IO, Any

import numpy as np

from data_prep.config import QUESTION, ReasoningGymSource
from data_prep.documents import Document
from data_prep.user_error import UserError

_PROCESS = [sys.executable, "-m", "data_prep.sources.gym"]


class GymProcess:
    """The process that runs reasoning-gym; starts with the first request and ends with this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def documents(self, source: ReasoningGymSource, key: str, origins: dict[int, str]) -> list[Document]:
        """The entries with the given indices, as documents with the given origins.

        The same seed and options give the same entry. The answer is empty if the generator knows none. `key`: the
        source's key in the recipe, for errors. Raises UserError for an unknown generator, and for options that it
        refuses when created or when generating.
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
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None and replies is not None  # both are pipes
        try:
            _send({"source": source.model_dump(mode="json"), "key": key, "indices": indices}, requests)
            reply = json.loads(replies.readline())
        except (BrokenPipeError, ValueError) as error:
            raise UserError(
                f"{key}: the process of {source.generator} ended, most likely out of memory; free some, or use "
                "fewer cores (taskset)"
            ) from error
        if "mistake" in reply:
            raise UserError(reply["mistake"])
        return reply["entries"]


def _start() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(_PROCESS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _send(message: dict[str, Any], stream: IO[bytes]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def _serve() -> None:
    """Answers the requests of `GymProcess` on standard input, one per line, until it is closed."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit silently if nobody reads the replies
    built: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        source, key = ReasoningGymSource(**asked["source"]), asked["key"]
        described = json.dumps(asked["source"])
        try:
            if described not in built:
                built[described] = _build(source, key)
            reply: dict[str, Any] = {
                "entries": [_entry(built[described], index, source, key) for index in asked["indices"]]
            }
        except UserError as error:
            reply = {"mistake": str(error)}
        _send(reply, sys.stdout.buffer)


def _build(source: ReasoningGymSource, key: str) -> Any:
    from reasoning_gym.factory import DATASETS, create_dataset  # slow: over a second

    if source.generator not in DATASETS:
        near = difflib.get_close_matches(source.generator, DATASETS, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else f"it has {', '.join(sorted(DATASETS))}"
        raise UserError(f"{key}.generator: {source.generator!r} is not a reasoning-gym generator; {hint}")

    known = [field.name for field in dataclasses.fields(DATASETS[source.generator][1])]
    for option in source.options:
        if option not in known:
            choices = ", ".join(sorted(set(known) - {"seed", "size"}))
            raise UserError(f"{key}.options: {source.generator} has no option {option!r}; it has {choices}")
    try:
        return create_dataset(source.generator, size=source.count, seed=source.seed, **source.options)
    except Exception as error:  # generators check options in many ways, mostly with bare asserts
        raise UserError(_refusal(source, key, "refuses its options", error)) from error


def _entry(generator: Any, index: int, source: ReasoningGymSource, key: str) -> tuple[str, str]:
    random.seed(source.seed + index)
    np.random.seed((source.seed + index) % 2**32)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some generators print their progress
            entry = generator[index]
    except Exception as error:  # options that passed the checks can still be impossible to satisfy
        raise UserError(_refusal(source, key, f"failed at entry {index}", error)) from error
    answer = entry["answer"]
    return entry["question"], "" if answer is None else str(answer)


def _refusal(source: ReasoningGymSource, key: str, what: str, error: Exception) -> str:
    cause = " ".join(str(error).split()) or type(error).__name__
    return f"{key}.options: {source.generator} {what} {source.options}: {cause}; correct the options"


if __name__ == "__main__":
    _serve()
