"""The held-out split: the size that is asked for, no leak into training, and stable when data is added."""

import numpy as np
import pytest

from data_prep.documents import Document
from data_prep.encode import Encoded
from data_prep.errors import UserError
from data_prep.split import split_documents


def document(text: str, task: str = "sums") -> Encoded:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "4"}]
    ids = np.arange(3, dtype=np.int32)
    return Encoded(Document(task, messages, "file:1"), ids, ids, truncated=False)


def documents(count: int, task: str = "sums") -> list[Encoded]:
    return [document(f"{task} {i}", task) for i in range(count)]


def texts(encoded: list[Encoded]) -> list[str]:
    return [each.document.messages[0]["content"] for each in encoded]


def test_a_count_is_kept_per_task_and_the_rest_trains_in_order():
    every = documents(20) + documents(30, "words")
    split = split_documents(every, 5, seed=0)
    assert sum(text.startswith("sums") for text in texts(split.held_out)) == 5
    assert sum(text.startswith("words") for text in texts(split.held_out)) == 5
    held_out = set(texts(split.held_out))
    assert texts(split.train) == [text for text in texts(every) if text not in held_out]
    assert split.dropped == []


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_a_fraction_is_kept_within_five_standard_deviations(fraction):
    kept = len(split_documents(documents(4000), fraction, seed=0).held_out)
    assert abs(kept - 4000 * fraction) < 5 * (4000 * fraction * (1 - fraction)) ** 0.5


@pytest.mark.parametrize("held_out", [5, 0.2])
def test_the_split_is_a_function_of_the_seed(held_out):
    first, again, other = (split_documents(documents(100), held_out, seed) for seed in (1, 1, 2))
    assert texts(first.held_out) == texts(again.held_out) != texts(other.held_out)


def test_a_fraction_stays_put_when_data_is_added_or_reordered():
    before = texts(split_documents(documents(100), 0.2, seed=0).held_out)
    more = documents(50, "words") + documents(140)[::-1]
    after = texts(split_documents(more, 0.2, seed=0).held_out)
    old = set(texts(documents(100)))
    assert sorted(text for text in after if text in old) == sorted(before)


def test_a_count_never_holds_out_what_it_trained_on_before_data_was_added():
    before = split_documents(documents(100), 10, seed=0)
    after = split_documents(documents(140) + documents(50, "words"), 10, seed=0)
    assert not set(texts(after.held_out)) & set(texts(before.train))


def test_no_held_out_document_trains_under_any_task():
    shared = [document(f"sums {i % 20}", task) for i in range(40) for task in ("a", "b")]
    spaced = [document(f" sums {i}\n", task="a") for i in range(20)]
    split = split_documents(shared + spaced, 5, seed=0)
    held_out = {text.strip() for text in texts(split.held_out)}
    assert not held_out & {text.strip() for text in texts(split.train)}
    assert len(split.train) + len(split.held_out) + len(split.dropped) == 100
    assert {dropped.reason for dropped in split.dropped} == {"duplicate_of_held_out"}


def test_copies_within_training_stay_and_count_once_for_the_size():
    split = split_documents([document(f"{i}") for i in range(10)] * 3, 4, seed=0)
    assert len(set(texts(split.held_out))) == len(split.held_out) == 4
    assert len(split.train) == 3 * 6
    assert len(split.dropped) == 2 * 4


def test_more_held_out_documents_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"^data\.held_out: 3 documents per task, but task 'sums' has 3 different ones"):
        split_documents(documents(3) * 2, 3, seed=0)
