"""What transformers is told of packed rows equals what it would find by reading them."""

import pytest
import torch
from transformers import masking_utils

from trainer.base.packed_documents import packed_is_known

PACKED = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
WHOLE = [[0, 1, 2, 3], [0, 1, 2, 3]]


def same_document(numbers: torch.Tensor) -> torch.Tensor:
    return numbers[:, :, None] == numbers[:, None, :]


def test_documents_are_those_that_transformers_finds():
    positions = torch.tensor(PACKED)
    found = masking_utils.find_packed_sequence_indices(positions)
    with packed_is_known(packed=True):
        told = masking_utils.find_packed_sequence_indices(positions)
    assert torch.equal(same_document(told), same_document(found))


def test_rows_of_one_document_have_none_to_tell_apart():
    positions = torch.tensor(WHOLE)
    assert masking_utils.find_packed_sequence_indices(positions) is None
    with packed_is_known(packed=False):
        assert masking_utils.find_packed_sequence_indices(positions) is None


def test_transformers_looks_for_itself_again_afterwards():
    original = masking_utils.find_packed_sequence_indices
    with pytest.raises(ZeroDivisionError), packed_is_known(packed=True):
        raise ZeroDivisionError
    assert masking_utils.find_packed_sequence_indices is original
