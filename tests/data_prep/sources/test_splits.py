"""Folders and patterns whose files are named after several splits are refused; `split` chooses one."""

import pytest

from data_prep.config import FilesSource
from data_prep.sources.finding import find_files
from data_prep.user_error import UserError


@pytest.fixture
def folder(tmp_path):
    def fill(*names: str):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}\n")
        return tmp_path

    return fill


def found(path, **keys) -> tuple[list[str], list[str]]:
    base = path if path.is_dir() else path.parent
    files, skipped = find_files(FilesSource(type="files", task="sums", path=path, **keys), "data.sources.0")
    return [str(f.relative_to(base)) for f in files], [str(f.relative_to(base)) for f in skipped]


def refusal(path, **keys) -> str:
    with pytest.raises(UserError) as caught:
        found(path, **keys)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["train.jsonl", "test.jsonl"], "train*.jsonl"),
        (["train.jsonl", "valid.jsonl"], "train*.jsonl"),
        (["trn.jsonl", "tst.jsonl"], "trn*.jsonl"),
        (["Train.csv", "Dev.csv"], "Train*.csv"),
        (["data/train-00000-of-00002.parquet", "data/validation-00000-of-00001.parquet"], "data/train*.parquet"),
        (["alpaca_train.jsonl.gz", "alpaca_eval.jsonl.gz"], "alpaca_train*.jsonl.gz"),
        (["wiki.train.txt", "wiki.test.txt"], "wiki.train*.txt"),
        (["train/x.jsonl", "test/x.jsonl"], "train"),
        (["math/train/x.jsonl", "math/held-out/x.jsonl"], "math/train"),
        (["train_sft-0.parquet", "test_sft-0.parquet"], "train*.parquet"),
        (["json-train.arrow", "json-heldout.arrow"], "json-train*.arrow"),
        (["a.jsonl", "train.jsonl", "train2.jsonl", "test2.jsonl"], "train*.jsonl"),
        (["mytrain.jsonl", "mytest.jsonl"], "mytrain*.jsonl"),
        (["TrainSet.json.gz", "test_set.json.gz"], "Train*.json.gz"),
        (["my-training/a.jsonl", "myval/b.jsonl"], "my-training"),
        (["trainA.csv", "trainB.csv", "testA.csv"], "train*.csv"),
    ],
)
def test_names_of_several_splits_are_refused_with_both_remedies(folder, names, hint):
    path = folder(*names)
    message = refusal(path)
    assert message.startswith(f"data.sources.0.path: {path} holds files of several splits (")
    assert message.endswith(f"); set data.sources.0.split: train, or path: {path}/{hint}")


def test_splits_within_words_are_read_alone_and_words_that_hold_one_by_chance_are_no_splits(folder):
    path = folder("mytrain.jsonl", "mytest.jsonl", "notes.jsonl")
    assert found(path, split="train") == (["mytrain.jsonl"], ["mytest.jsonl", "notes.jsonl"])
    (path / "mytest.jsonl").rename(path / "contest.jsonl")
    assert found(path) == (["contest.jsonl", "mytrain.jsonl", "notes.jsonl"], [])


def test_a_pattern_is_like_a_folder(folder):
    path = folder("data/train.jsonl", "data/test.jsonl", "test/a.jsonl", "test/b.jsonl")
    assert refusal(path / "data/t*.jsonl").endswith(f"split: train, or path: {path}/data/train*.jsonl")
    assert found(path / "data/train*.jsonl") == (["train.jsonl"], [])
    assert found(path / "test/*.jsonl") == (["a.jsonl", "b.jsonl"], [])


def test_a_test_set_beside_the_data_is_refused(folder):
    path = folder("data.jsonl", "test.jsonl")
    assert refusal(path) == (
        f"data.sources.0.path: {path} holds files of several splits (data.jsonl, test.jsonl); give a path without "
        f"{path}/test*.jsonl"
    )


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "more.jsonl"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["test.jsonl"],
        ["test-0.jsonl", "test-1.jsonl"],
        ["contest.jsonl", "devops.jsonl", "trainer.jsonl", "a.jsonl"],
        ["test_questions.jsonl", "answers.jsonl"],
        ["training.md", "testing.md", "evaluation.md"],
        ["train/test_taking.jsonl"],
    ],
)
def test_names_of_one_split_or_none_pass(folder, names):
    assert found(folder(*names)) == (names, []) or found(folder(*names)) == (sorted(names), [])


@pytest.mark.parametrize(
    ("split", "files"),
    [
        ("train", ["train-0.jsonl"]),
        ("validation", ["dev.jsonl", "sub/val/x.jsonl"]),
        ("valid", ["dev.jsonl", "sub/val/x.jsonl"]),
        ("test", ["test_sft.jsonl", "train_of_thought/test.jsonl"]),
        ("test_sft", ["test_sft.jsonl"]),
        ("held_out", ["heldout.jsonl"]),
    ],
)
def test_split_reads_its_files_and_lists_the_others_as_skipped(folder, split, files):
    every = ["dev.jsonl", "heldout.jsonl", "test_sft.jsonl", "train-0.jsonl", "sub/val/x.jsonl"]
    every += ["train_of_thought/test.jsonl", "other.jsonl"]
    chosen, skipped = found(folder(*every), split=split)
    assert sorted(chosen) == sorted(files)
    assert sorted(skipped) == sorted({*every} - {*files})


def test_a_split_that_no_name_tells_of_is_refused(folder):
    path = folder("train.jsonl", "test.jsonl")
    assert refusal(path, split="validation") == (
        f"data.sources.0.split: none of the 2 files in {path} is of split 'validation'; their names tell of test, train"
    )
    assert refusal(path / "t*.jsonl", split="dev").endswith("their names tell of test, train")
    plain = folder("sub/a.jsonl") / "sub"
    assert refusal(plain, split="train").endswith("is of split 'train'; the first is a.jsonl")


def test_split_chooses_a_folder_that_datasets_has_saved(folder):
    names = ["dataset_dict.json", "sft/data-0.arrow", "train/data-0.arrow", "train_2/data-0.arrow"]
    path = folder(*names)
    assert found(path, split="train") == (["train/data-0.arrow"], [])
    assert found(path, split="sft") == (["sft/data-0.arrow"], [])
    assert refusal(path, split="test") == (
        f"data.sources.0.split: {path} has no split 'test'; give the name of one of its folders"
    )
    assert "holds several splits; give one of them" in refusal(path)


def test_files_of_other_splits_may_be_pointers(folder):
    path = folder("train.jsonl", "test.jsonl")
    (path / "test.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert found(path, split="train") == (["train.jsonl"], ["test.jsonl"])
