"""Where the documents of packed rows lie, told to transformers 5.23 so that it does not read it back from the GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import masking_utils

from trainer.recipe import TAKE_LENGTHS


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
    original = masking_utils.find_packed_sequence_indices

    def find_packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
        return (position_ids == 0).cumsum(-1) if packed else None

    masking_utils.find_packed_sequence_indices = find_packed_sequence_indices
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
