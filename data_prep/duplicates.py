"""Finds duplicates: exact ones by document digest, near ones by MinHash."""

import importlib.util
import json
from collections.abc import Sequence

import numpy as np

from data_prep.config import CleaningConfig
from data_prep.documents import Document, Message, normalize_text
from data_prep.user_error import UserError
from data_prep.word_splitting import signs_apart

DUPLICATE = "duplicate"
DUPLICATE_OF_HELD_OUT = "duplicate_of_held_out"
NEAR_DUPLICATE = "near_duplicate"

SAME_TEXT = ("task", "high", "low")  # fields of DOCUMENT that are equal in copies
SAME_LABELS = (*SAME_TEXT, "learned")  # also equal where the same turns are learned

_PERMUTATIONS = 128
_SHINGLE = 5  # consecutive words


def refuse_missing_library(cleaning: CleaningConfig) -> None:
    """Raises UserError if the recipe drops near duplicates and datasketch, which finds them, is not installed."""
    if cleaning.near_duplicates is not None and importlib.util.find_spec("datasketch") is None:
        raise UserError(
            "data.cleaning.near_duplicates: needs the package datasketch, which is not installed; run "
            "`pip install 'teamlora[near-duplicates]'`, or set it to null"
        )


class MinHasher:
    """MinHash signatures of documents (Broder 1997) over runs of five words, using datasketch."""

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


class NearDuplicateFilter:
    """Finds documents that are similar to an earlier one of their task.

    Keeps all signatures in memory, about 6 KB per document.
    """

    def __init__(self, threshold: float, tasks: int) -> None:
        from datasketch import MinHash, MinHashLSH

        self._minhash = MinHash(num_perm=_PERMUTATIONS, seed=1)
        self._threshold = threshold
        # The index proposes candidates and the signatures decide. These weights favor recall: of the pairs exactly at
        # the threshold, it misses one in five.
        self._seen = [MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9)) for _ in range(tasks)]
        self._signatures: list[np.ndarray] = []
        self._kept: list[bool] = []

    @property
    def kept(self) -> np.ndarray:
        """Which of all documents resemble none before them; bool [documents]."""
        return np.array(self._kept, bool)

    def add(self, documents: np.ndarray, signatures: np.ndarray) -> None:
        """Adds the documents of a block, DOCUMENT [n]; the pieces of a document share its result."""
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


def mark_first_copies(documents: np.ndarray, same: Sequence[str] = SAME_TEXT) -> np.ndarray:
    """Which documents (DOCUMENT [n]) are the first with their values of the fields `same`; bool [n].

    All pieces of a first document are first.
    """
    text = [documents[name] for name in same]
    order = np.lexsort(text)  # stable: copies stay in source order
    begins = np.ones(len(documents), bool)
    begins[1:] = np.any([part[order][1:] != part[order][:-1] for part in text], axis=0)
    firsts = order[begins][np.cumsum(begins) - 1]  # for each document in that order, the first with its text
    first = np.empty(len(documents), bool)
    first[order] = np.all([documents[row][order] == documents[row][firsts] for row in ("file", "number")], axis=0)
    return first


def _shingles(document: Document) -> list[bytes]:
    """All runs of five words in the document, tool calls included.

    Leaves out system turns: a long one that many documents share would make them similar.
    """
    turns = (turn for turn in document.messages if turn["role"] != "system")
    words = signs_apart(normalize_text("\n".join([document.text or "", *map(_said, turns)])).lower()).split()
    count = max(1, len(words) - _SHINGLE + 1)
    return [" ".join(words[start : start + _SHINGLE]).encode() for start in range(count)]


def _said(turn: Message) -> str:
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
    return "\n".join([turn.get("reasoning_content") or "", turn.get("content") or "", calls])
