"""How whole tensors are cut into buckets, and from whom each element comes."""

import pytest

from trainer.checkpoint import async_saver
from trainer.checkpoint.async_saver import TensorSlice
from trainer.checkpoint.trained_state import StateKey

A, B, C = (StateKey("parameter", name, (size,)) for name, size in (("a", 10), ("b", 6), ("c", 40)))


def test_a_bucket_holds_what_there_is_room_for_and_a_larger_tensor_is_one_of_its_own(monkeypatch):
    monkeypatch.setattr(async_saver, "BUCKET_BYTES", 16 * async_saver.ELEMENT)
    pieces = [[TensorSlice(0, key, 0, key.numel) for key in (A, B, C)]]
    assert [bucket.keys for bucket in async_saver.make_buckets([A, B, C], pieces)] == [(A, B), (C,)]


def test_every_element_comes_once_and_of_equal_runs_from_the_first_rank():
    cut = [TensorSlice(0, A, 0, 5), TensorSlice(0, B, 0, 6)], [TensorSlice(1, A, 5, 5), TensorSlice(1, B, 0, 6)]
    (bucket,) = async_saver.make_buckets([A, B], list(cut))
    assert [(p.rank, p.key, p.start) for p in bucket.slices] == [(0, A, 0), (0, B, 0), (1, A, 5)]
    assert (bucket.numel_of(0), bucket.numel_of(1)) == (11, 5)


def test_elements_that_no_rank_holds_are_no_checkpoint():
    with pytest.raises(RuntimeError, match="hold 5 of 10 elements"):
        async_saver.make_buckets([A], [[TensorSlice(0, A, 0, 5)]])
