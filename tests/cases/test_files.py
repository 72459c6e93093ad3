"""Files as people have them, each from a public report: read for what they hold, or refused by what they are."""

import shutil
from pathlib import Path

import pytest

from data_prep.user_error import UserError
from tests.data_prep.reading import places, read, refusal, texts
from trainer.base.model_folder import files_of_model, resolve_folder
from trainer.recipe import BaseModelConfig

CASES = Path(__file__).parent
POINTER = "is a Git LFS pointer, not the file; run `git lfs pull`"


def test_11_a_folder_of_train_and_test_is_refused_with_both_remedies():
    folder = CASES / "11-folder-with-train-and-test/split"
    assert refusal(folder) == (
        f"data.sources.0.path: {folder} holds files of several splits (test.jsonl, train.jsonl); set "
        f"data.sources.0.split: train, or path: {folder}/train*.jsonl"
    )
    for chosen in (read(folder, split="train"), read(folder / "train*.jsonl")):
        assert texts(chosen) == [["a", "b"]]


def test_13_a_lone_quote_in_a_tsv_is_text_and_swallows_no_line():
    folder = CASES / "13-tsv-with-a-lone-quote"
    assert texts(read(folder / "loud.tsv")) == [["say", '"Hello" she said']]
    pairs = read(folder / "pairs.tsv")
    assert texts(pairs) == [["say", '"Hello there'], ["name", "Bob"], ["say", 'bye"'], ["x", "y"]]
    assert places(pairs) == [":2", ":3", ":4", ":5"]


def test_20_json_texts_in_arrow_columns_are_turns_and_tools():
    (document,) = read(CASES / "20-arrow-json-columns/json.parquet")
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    assert document.messages[0] == {"role": "user", "content": "Weather in Oslo?"}
    assert document.messages[1]["tool_calls"] == [call]
    assert [turn.get("content") for turn in document.messages[2:]] == ["rain", "Rain."]
    assert document.tools[0]["function"]["parameters"]["properties"] == {"city": {"type": "string"}}


def test_20_maps_in_arrow_columns_are_objects():
    (document,) = read(CASES / "20-arrow-json-columns/map.parquet")
    function = {"name": "get", "arguments": {"city": "Oslo"}}
    assert document.messages[1]["tool_calls"] == [{"type": "function", "function": function}]


def test_33_each_list_of_turns_is_a_conversation():
    documents = read(CASES / "33-a-list-of-turns-a-line/rows.jsonl")
    assert texts(documents) == [["Weather in Oslo?", "Rain."], ["Again?", "Sun."]]
    assert places(documents) == [":1", ":2"]
    assert [[turn["role"] for turn in document.messages] for document in documents] == [["user", "assistant"]] * 2


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data.txt"])
def test_35_a_git_lfs_pointer_in_place_of_data_is_named(name):
    path = CASES / "35-git-lfs-pointers" / name
    assert refusal(path) == f"data.sources.0.path: {path} {POINTER}"


def test_35_a_git_lfs_pointer_in_place_of_weights_is_named(tmp_path):
    path = shutil.copy(CASES / "35-git-lfs-pointers/model.safetensors", tmp_path)
    with pytest.raises(UserError) as caught:
        files_of_model(tmp_path)
    assert str(caught.value) == f"base.model: {path} {POINTER}"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"])
def test_35_a_git_lfs_pointer_in_place_of_a_small_file_of_the_base_is_named(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(CASES / "35-git-lfs-pointers/data.txt", tmp_path / name)
    with pytest.raises(UserError) as caught:
        resolve_folder(BaseModelConfig(model=str(tmp_path)))
    assert str(caught.value) == f"base.model: {tmp_path / name} {POINTER}"
