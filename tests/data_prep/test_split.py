"""The held-out split: the requested size, no leak into training, and stable when data is added."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.config import DataConfig
from data_prep.split import Split, split_documents
from data_prep.user_error import UserError
from tests.data_prep.documents import described

TASKS = ["sums", "words"]


def config(held_out: float | int, **cleaning: str) -> DataConfig:
    sources = [{"type": "files", "task": task, "path": f"{task}.jsonl"} for task in TASKS]
    return DataConfig(prepared_dir=Path("unused"), sources=sources, seq_len=8, held_out=held_out, cleaning=cleaning)


class Scene:
    """Texts of both tasks, split; `side` lists each side's documents as "task text"."""

    def __init__(self, sums: list[str], words: list[str], held_out: float | int, seed: int = 0, **cleaning: str):
        self.texts = [f"sums {text}" for text in sums] + [f"words {text}" for text in words]
        every = np.concatenate([described(sums, 0, seed), described(words, 1, seed)])
        self.split: Split = split_documents(every, config(held_out, **cleaning))

    def at(self, indices: np.ndarray) -> list[str]:
        return [self.texts[index] for index in indices]

    @property
    def train(self) -> list[str]:
        return self.at(self.split.train)

    @property
    def held_out(self) -> list[str]:
        return self.at(self.split.held_out)

    @property
    def removed(self) -> dict[str, list[str]]:
        return {reason: self.at(which) for reason, which in self.split.removed.items()}


def numbers(count: int, start: int = 0) -> list[str]:
    return [f"n{i}" for i in range(start, start + count)]


NOTHING = {"duplicate": [], "duplicate_of_held_out": []}


def test_a_count_is_kept_per_task_and_the_rest_trains_in_order():
    scene = Scene(numbers(20), numbers(30, start=100), held_out=5)
    assert [sum(text.startswith(task) for text in scene.held_out) for task in TASKS] == [5, 5]
    assert scene.train == [text for text in scene.texts if text not in set(scene.held_out)]
    assert scene.removed == NOTHING


def test_nothing_is_held_out_where_zero_is_asked_for():
    scene = Scene(numbers(20) + numbers(2), [], 0)
    assert (scene.train, scene.held_out) == (scene.texts[:20], [])
    assert scene.removed == {**NOTHING, "duplicate": scene.texts[20:]}


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_a_fraction_is_kept_within_five_standard_deviations(fraction):
    kept = len(Scene(numbers(4000), [], fraction).held_out)
    assert abs(kept - 4000 * fraction) < 5 * (4000 * fraction * (1 - fraction)) ** 0.5


@pytest.mark.parametrize("held_out", [5, 0.2])
def test_the_split_is_a_function_of_the_seed(held_out):
    first, again, other = (Scene(numbers(100), numbers(100), held_out, seed).held_out for seed in (1, 1, 2))
    assert first == again != other


def test_a_fraction_stays_put_when_data_is_added_or_reordered():
    before = Scene(numbers(100), [], 0.2).held_out
    after = Scene(numbers(140)[::-1], numbers(50, start=200), 0.2).held_out
    old = {f"sums {text}" for text in numbers(100)}
    assert sorted(text for text in after if text in old) == sorted(before)


def test_a_count_never_holds_out_what_it_trained_on_before_data_was_added():
    before = Scene(numbers(100), numbers(50, start=200), 10)
    after = Scene(numbers(140), numbers(90, start=200), 10)
    assert len(after.held_out) == 20
    assert not set(after.held_out) & set(before.train)


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
@pytest.mark.parametrize("held_out", [5, 0.3])
def test_no_held_out_document_trains_under_any_task(held_out, duplicates):
    shared = numbers(20) * 2 + [f" {text}\n" for text in numbers(20)]
    scene = Scene(shared, numbers(20) + numbers(20), held_out, duplicates=duplicates)
    held_out_texts = {text.split()[1] for text in scene.held_out}
    assert held_out_texts
    assert not held_out_texts & {text.split()[1] for text in scene.train}
    assert len(scene.train) + len(scene.held_out) + sum(map(len, scene.removed.values())) == 100
    assert {text.split()[1] for text in scene.removed["duplicate_of_held_out"]} == held_out_texts
    assert len(set(scene.held_out)) == len(scene.held_out)  # not twice under the same task


@pytest.mark.parametrize(("duplicates", "copies_left"), [("drop", 1), ("keep", 3)])
def test_copies_within_training_go_or_stay_as_asked_and_count_once_for_the_size(duplicates, copies_left):
    scene = Scene(numbers(10) * 3, numbers(7, start=100), 4, duplicates=duplicates)
    held_out, train = ([t for t in texts if t.startswith("sums")] for texts in (scene.held_out, scene.train))
    assert len(set(held_out)) == len(held_out) == 4
    assert sorted(train) == sorted(list(set(train)) * copies_left) and len(set(train)) == 6
    assert len(scene.removed["duplicate_of_held_out"]) == 2 * 4
    assert len(scene.removed["duplicate"]) == (3 - copies_left) * 6


def test_of_copies_the_first_in_the_sources_stays():
    scene = Scene(numbers(10) * 2, numbers(10, start=100), 2)
    assert max(scene.split.train[scene.split.train < 20]) < 10
    assert min(scene.split.removed["duplicate"]) >= 10


def test_copies_in_different_tasks_stay_in_training():
    scene = Scene(numbers(50), numbers(50), 0.2)
    assert len(scene.train) + len(scene.held_out) == 100 and scene.removed == NOTHING
    for texts in (scene.train, scene.held_out):
        of_sums, of_words = ({t.split()[1] for t in texts if t.startswith(task)} for task in TASKS)
        assert of_sums == of_words


@pytest.mark.parametrize("held_out", [5, 0.3])
def test_all_pieces_of_a_document_are_on_one_side_and_the_count_is_of_documents(held_out):
    texts = numbers(30)
    pieces = np.concatenate([described(texts, 0, pieces=3), described(texts, 0, pieces=3), described(["w"] * 9, 1)])
    pieces["number"][90:180] += 30  # other rows of the file
    pieces["low"][-9:] += np.arange(9, dtype=np.uint64)  # nine different words
    split = split_documents(pieces, config(held_out))
    sums = np.arange(len(pieces)) < 180
    sides = {name: set(indices.tolist()) for name, indices in (("train", split.train), ("held_out", split.held_out))}
    for number in range(30):
        first, copy = ({3 * number + offset + piece for piece in range(3)} for offset in (0, 90))
        assert first <= sides["train"] or first <= sides["held_out"]
        reason = "duplicate" if first <= sides["train"] else "duplicate_of_held_out"
        assert copy <= set(split.removed[reason].tolist())
    if held_out == 5:
        assert np.count_nonzero(sums[split.held_out]) == 5 * 3


def test_a_copy_in_more_pieces_goes_with_all_of_them():
    copy = described(numbers(10), 0, pieces=3)
    copy["number"] += 10
    split = split_documents(
        np.concatenate([described(numbers(10), 0, pieces=2), copy, described(["w"], 1)]), config(1e-9)
    )
    assert split.train.tolist() == [*range(20), 50]
    assert split.removed["duplicate"].tolist() == list(range(20, 50))


def test_more_held_out_documents_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"^data\.held_out: 3 documents per task, but task 'sums' has 3 distinct ones"):
        Scene(numbers(3) * 2, numbers(9), 3)
