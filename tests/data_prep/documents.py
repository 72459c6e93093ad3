"""Makes the arrays that preparation keeps of documents, from texts."""

from collections.abc import Sequence

import numpy as np

from data_prep.documents import Document
from data_prep.workers import DOCUMENT


def described(
    texts: Sequence[str], task: int = 0, seed: int = 0, tokens: int | Sequence[int] = 3, pieces: int = 1
) -> np.ndarray:
    """DOCUMENT [texts x pieces]: a conversation for each text, in `pieces` pieces one after the other.

    `number` is the index into the texts; file, start and item are left at 0.
    """
    documents = np.zeros(len(texts), DOCUMENT)
    for index, text in enumerate(texts):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "4"}]
        digest = Document("task", messages, "file:1", "chat").digest(seed, None)
        documents[index]["number"] = index
        documents[index]["high"] = int.from_bytes(digest[:8], "big")
        documents[index]["low"] = int.from_bytes(digest[8:], "big")
    documents["task"], documents["tokens"] = task, tokens
    documents = np.repeat(documents, pieces)
    documents["piece"] = np.tile(np.arange(pieces), len(texts))
    return documents
