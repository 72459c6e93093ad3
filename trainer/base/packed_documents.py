"""Where the documents of packed rows lie, told to transformers 5.23 so that it does not read it back from the GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import masking_utils

TAKE_LENGTHS = ("flash_attention_2", "varlen")
"""Kinds of attention that take documents by their lengths; the others take a mask, which position_ids give."""


def document_arguments(attention: str, document_starts: Tensor, longest_document: int) -> dict[str, Any]:
    """What a model's forward needs beside position_ids to keep documents apart, in any number of rows.

    document_starts: int32 [documents + 1], on the model's device, counted over all rows; the last is the end. Without
    these arguments flash_attention_2 looks for documents in each layer again, and in batches of one row only; with
    them it takes all rows as one ([rows * seq, heads, d]).
    """
    if attention not in TAKE_LENGTHS:
        return {}
    starts = {f"cu_seq_lens_{side}": document_starts for side in "qk"}
    return starts | {f"max_length_{side}": longest_document for side in "qk"}


@contextmanager
def packed_is_known(packed: bool) -> Iterator[None]:
    """Within, transformers builds masks without asking the GPU whether rows hold several documents.

    packed: whether any row does. All documents begin at position 0.
    """
    patched: Any = masking_utils
    original = patched.find_packed_sequence_indices
    patched.find_packed_sequence_indices = _document_numbers if packed else _no_documents
    try:
        yield
    finally:
        patched.find_packed_sequence_indices = original


def _document_numbers(position_ids: Tensor) -> Tensor:
    return (position_ids == 0).cumsum(-1)


def _no_documents(_position_ids: Tensor) -> None:
    return None
