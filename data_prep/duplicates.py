"""Documents that are there twice: copies by their digest, near copies by MinHash."""

import importlib.util
import json
from collections.abc import Sequence

import numpy as np

from data_prep.config import CleaningConfig
from data_prep.documents import Document, Message, normalised
from data_prep.user_error import UserError
from data_prep.word_splitting import signs_apart

DUPLICATE = "duplicate"
DUPLICATE_OF_HELD_OUT = "duplicate_of_held_out"
NEAR_DUPLICATE = "near_duplicate"

SAME_TEXT = ("task", "high", "low")  # fields of DOCUMENT that copies share
SAME_LESSON = (*SAME_TEXT, "learned")  # and those from which the same is learned

_PERMUTATIONS = 128
_SHINGLE = 5  # words that follow one another


def refuse_missing_library(cleaning: CleaningConfig) -> None:
    """Raises UserError where near duplicates are to go and the library that finds them is not installed."""
    if cleaning.near_duplicates is not None and importlib.util.find_spec("datasketch") is None:
        raise UserError(
            "data.cleaning.near_duplicates: needs the package datasketch, which is not installed; run `bash "
            "launch/install.sh near-duplicates`, or set it to null"
        )


class Signer:
    """MinHash signatures of documents (Broder 1997) over runs of five words, by datasketch."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self._empty = MinHash(num_perm=_PERMUTATIONS, seed=1)

    def sign(self, documents: Sequence[Document]) -> np.ndarray:
        """uint32 [documents, permutations]."""
        signatures = np.empty((len(documents), _PERMUTATIONS), np.uint32)
        for signature, document in zip(signatures, documents, strict=True):
            minhash = self._empty.copy()
            minhash.update_batch(_shingles(document))
            signature[:] = minhash.hashvalues
        return signatures


class NearDuplicates:
    """Finds near duplicates among the documents of a task, as they come.

    Keeps all signatures in memory, about 6 KB a document.
    """

    def __init__(self, threshold: float, tasks: int) -> None:
        from datasketch import MinHash, MinHashLSH

        self._minhash = MinHash(num_perm=_PERMUTATIONS, seed=1)
        self._threshold = threshold
        # The index only proposes, the signatures decide: it is to miss few, one in five of the pairs at the threshold.
        self._seen = [MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9)) for _ in range(tasks)]
        self._signatures: list[np.ndarray] = []
        self._kept: list[bool] = []

    @property
    def kept(self) -> np.ndarray:
        """Which of all the documents are like none before them; bool [documents]."""
        return np.array(self._kept, bool)

    def add(self, documents: np.ndarray, signatures: np.ndarray) -> None:
        """Takes up the documents of a block, DOCUMENT [n]; the pieces of one go together."""
        for index, signature in enumerate(signatures):
            another_piece = index and documents["number"][index] == documents["number"][index - 1]
            self._kept.append(self._kept[-1] if another_piece else self._is_new(documents["task"][index], signature))

    def _is_new(self, task: int, signature: np.ndarray) -> bool:
        self._minhash.hashvalues = signature
        candidates = (self._signatures[key] for key in self._seen[task].query(self._minhash))
        if any(np.mean(other == signature) >= self._threshold for other in candidates):
            return False
        self._seen[task].insert(len(self._signatures), self._minhash)
        self._signatures.append(signature)
        return True


def first_of_copies(documents: np.ndarray, same: Sequence[str] = SAME_TEXT) -> np.ndarray:
    """Which documents (DOCUMENT [n]) are the first with `same` values; bool [n]. All pieces of one are."""
    text = [documents[name] for name in same]
    order = np.lexsort(text)  # stable: copies stay in the order of the sources
    begins = np.ones(len(documents), bool)
    begins[1:] = np.any([part[order][1:] != part[order][:-1] for part in text], axis=0)
    firsts = order[begins][np.cumsum(begins) - 1]  # of each in that order, the first of its text
    first = np.empty(len(documents), bool)
    first[order] = np.all([documents[row][order] == documents[row][firsts] for row in ("file", "number")], axis=0)
    return first


def _shingles(document: Document) -> list[bytes]:
    """All that the document says, calls of tools included, in runs of words.

    System turns are left out: a long one that many documents share would make them alike.
    """
    turns = (turn for turn in document.messages if turn["role"] != "system")
    words = signs_apart(normalised("\n".join([document.text or "", *map(_said, turns)])).lower()).split()
    count = max(1, len(words) - _SHINGLE + 1)
    return [" ".join(words[start : start + _SHINGLE]).encode() for start in range(count)]


def _said(turn: Message) -> str:
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
    return "\n".join([turn.get("reasoning_content") or "", turn.get("content") or "", calls])
