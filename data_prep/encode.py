"""Documents to token ids and labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from data_prep.chat import ChatTemplate, Span
from data_prep.documents import Document, with_system_prompt

IGNORED = -100  # label of a token that is not scored; torch's and transformers' convention
_BATCH = 1000  # documents tokenised at once: enough to keep the tokenizer's threads busy, little memory

NO_ASSISTANT_TURN = "no_assistant_turn"
EMPTY_ANSWER = "empty_answer"
NO_LABELS_AFTER_TRUNCATION = "no_labels_after_truncation"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document ready to be packed. Both arrays are int32 of shape [tokens], at most seq_len of them."""

    document: Document
    input_ids: np.ndarray
    labels: np.ndarray  # not shifted; IGNORED but for assistant turns and their end tokens
    truncated: bool

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labelled_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document from which nothing can be learned, and why."""

    document: Document
    reason: str


class Encoder:
    """Tokenises documents and labels their assistant turns by position, never by token id.

    Raises UserError where the tokenizer has no chat template or gives no character offsets.
    """

    def __init__(self, tokenizer: Any, seq_len: int, system_prompt: str | None):
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._system_prompt = system_prompt
        self.template = ChatTemplate(tokenizer)

    def encode(self, documents: Iterator[Document]) -> Iterator[Encoded | Dropped]:
        """Every document of `documents`, in order, encoded or dropped."""
        while batch := list(islice(documents, _BATCH)):
            reasons = [_unusable(document) for document in batch]
            rendered = iter(self._encode_batch([d for d, reason in zip(batch, reasons, strict=True) if not reason]))
            for document, reason in zip(batch, reasons, strict=True):
                yield Dropped(document, reason) if reason else next(rendered)

    def _encode_batch(self, documents: Sequence[Document]) -> list[Encoded | Dropped]:
        if not documents:
            return []
        messages = [with_system_prompt(document.messages, self._system_prompt) for document in documents]
        rendered = [self.template.render(m, d.origin) for m, d in zip(messages, documents, strict=True)]
        tokens = self._tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,  # the template has written them
            truncation=False,
            padding=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # documents over the model's length are cut below
        )
        columns = zip(documents, rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True)
        return [self._label(document, spans, ids, offsets) for document, (_, spans), ids, offsets in columns]

    def _label(
        self, document: Document, spans: list[Span], token_ids: list[int], offsets: list[Span]
    ) -> Encoded | Dropped:
        ids = np.array(token_ids[: self._seq_len], dtype=np.int32)
        scored = _overlaps(np.array(offsets, dtype=np.int64).reshape(-1, 2)[: self._seq_len], spans)
        scored[:1] = False  # in a packed row the first token would be predicted from another document's last
        if not scored.any():
            return Dropped(document, NO_LABELS_AFTER_TRUNCATION)
        return Encoded(document, ids, np.where(scored, ids, np.int32(IGNORED)), len(token_ids) > self._seq_len)


def _unusable(document: Document) -> str | None:
    answer = document.answer_index()
    if answer is None:
        return NO_ASSISTANT_TURN
    return None if document.messages[answer]["content"].strip() else EMPTY_ANSWER


def _overlaps(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Which tokens (character offsets, [tokens, 2]) share a character with a span; bool [tokens].

    A token that also covers template text, such as the space before the answer, is the model's to write.
    """
    starts, ends = offsets[:, 0], offsets[:, 1].copy()
    # Some tokenizers give a token no width; it then reaches to where the next one begins.
    ends[:-1] = np.where(ends[:-1] == starts[:-1], starts[1:], ends[:-1])
    ends = np.maximum(ends, starts + 1)
    scored = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        scored |= (starts < end) & (ends > start)
    return scored
