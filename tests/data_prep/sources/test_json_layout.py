"""Shapes of JSON files other than one object per line and one array of objects."""

import io
import json
import tracemalloc

import pytest

from data_prep.documents import Document
from data_prep.sources.json_layout import find_layout, read_layout
from tests.data_prep.reading import GeneratedBytes, places, read, refusal, rows_of, texts

RECORDS = [{"instruction": "a", "output": "1"}, {"instruction": "b", "output": "2"}]
TURNS = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "1"}],
    [{"from": "human", "value": "b"}, {"from": "gpt", "value": "2"}],
]
EXPECTED = [["a", "1"], ["b", "2"]]
chunks = pytest.mark.parametrize("chunk", [1, 7, 2**20])


@pytest.fixture
def file(tmp_path):
    def write(*values: object, indent: int | None = None, end: str = "\n", name: str = "a.json"):
        path = tmp_path / name
        path.write_text(end.join(v if isinstance(v, str) else json.dumps(v, indent=indent) for v in values))
        return path

    return write


@chunks
def test_lists_of_turns_are_conversations_in_every_layout(file, monkeypatch, chunk):
    monkeypatch.setattr("data_prep.sources.json_array._CHUNK", chunk)
    layouts = {
        file(*TURNS, name="lines.jsonl"): [":1", ":2"],
        file("", *TURNS, end="\n\n", name="blank.jsonl"): [":3", ":5"],
        file(*TURNS, indent=1, name="several.json"): [":1", ":11"],
        file(TURNS, name="array.json"): ["[0]", "[1]"],
        file(TURNS, indent=1, name="pretty.json"): ["[0]", "[1]"],
        file({"data": TURNS}, name="object.json"): ["[0]", "[1]"],
    }
    for path, expected in layouts.items():
        documents = read(path)
        assert (path.name, texts(documents), places(documents)) == (path.name, EXPECTED, expected)


def test_one_conversation_may_be_the_whole_file(file):
    for indent in (None, 2):
        (document,) = read(file(TURNS[0], indent=indent))
        assert (texts([document]), places([document])) == ([["a", "1"]], [":1"])


def test_lines_of_lists_and_of_objects_may_be_mixed(file):
    assert texts(read(file(TURNS[0], RECORDS[1]))) == EXPECTED
    assert texts(read(file(RECORDS[0], TURNS[1]))) == EXPECTED


def test_a_list_of_other_things_on_a_line_is_refused_with_its_place(file):
    path = file(TURNS[0], [1, 2], TURNS[1])
    good, bad, last = rows_of(path)
    assert texts([good, last]) == EXPECTED
    assert str(bad) == f"{path}:2: not a JSON object; expected one JSON object per line, correct it"


def test_records_that_only_resemble_turns_stay_records(file):
    records = [{"role": "poet", **record} for record in RECORDS]
    assert texts(read(file(records))) == EXPECTED
    mapped = [{"from": "a", "to": "1"}, {"from": "b", "to": "2"}]
    assert texts(read(file(mapped), fields={"instruction": "from", "output": "to"})) == EXPECTED


@chunks
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "value",
    [
        {"data": RECORDS},
        {"version": "1.0", "rows": RECORDS, "total": 2, "about": {"a": [{"b": 1}]}, "ids": ["x", [1], {}]},
        {"data": RECORDS, "n": None, "ok": True, "x": -1.5e3, "tags": [], "nested": {"data": RECORDS}},
        {"features": [{"feature_idx": 0}], "rows": [{"row_idx": 0, "row": r, "truncated_cells": []} for r in RECORDS]},
    ],
    ids=["alone", "with notes", "nested", "viewer"],
)
def test_an_object_around_the_rows_is_opened(file, monkeypatch, value, indent, chunk):
    monkeypatch.setattr("data_prep.sources.json_array._CHUNK", chunk)
    documents = read(file(value, indent=indent))
    assert (texts(documents), places(documents)) == (EXPECTED, ["[0]", "[1]"])


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_around_several_lists_of_records_is_refused(file, indent):
    path = file({"train": RECORDS, "test": RECORDS}, indent=indent)
    assert refusal(path) == (
        f"{path}: one object with several lists of records (train, test); expected one list, save each as a file of "
        "its own"
    )


def test_a_row_that_the_viewer_has_cut_is_refused(file):
    row = {"row_idx": 0, "row": RECORDS[0], "truncated_cells": ["output"]}
    path = file({"rows": [row]})
    assert refusal(path) == f"{path}[0]: the Hub's viewer has cut ['output']; download the dataset itself"


@pytest.mark.parametrize("indent", [None, 2])
def test_one_record_with_lists_in_it_is_a_record(file, indent):
    record = {"sources": [{"url": "x"}], "messages": TURNS[0]}
    assert texts(read(file(record, indent=indent))) == [["a", "1"]]
    mapped = {"dialog": TURNS[0], "sources": [{"url": "x"}]}
    assert texts(read(file(mapped, indent=indent), fields={"messages": "dialog"})) == [["a", "1"]]


def test_lines_with_lists_of_objects_are_lines(file):
    path = file({"data": RECORDS}, {"data": RECORDS})
    assert refusal(path).startswith(f"{path}:1: fields ['data']; expected `messages`")


@chunks
def test_pretty_printed_objects_one_after_another_are_read(file, monkeypatch, chunk):
    monkeypatch.setattr("data_prep.sources.json_array._CHUNK", chunk)
    documents = read(file(*RECORDS, indent=2))
    assert (texts(documents), places(documents)) == (EXPECTED, [":1", ":5"])


@pytest.mark.parametrize(
    ("end", "expected"),
    [(",\n", ":4: found ',' in place of an object;"), ("\n]\n", ":5: found ']' in place of an object;")],
)
def test_anything_between_pretty_printed_objects_is_refused(file, end, expected):
    path = file(*RECORDS, indent=2, end=end)
    assert refusal(path).startswith(f"{path}{expected}")


def test_a_pretty_printed_object_without_an_end_is_refused(file):
    path = file(RECORDS[0], '{\n"instruction": "b"', indent=2)
    assert refusal(path) == f"{path}:5: the object has no end; the file is cut off or a quote is missing"


@pytest.mark.parametrize("first", ['{"instruction": "a"', '{"instruction": "a', "{]", '{"a" 1}', "}"])
def test_a_damaged_first_line_does_not_hide_the_others(file, first):
    path = file(first, *RECORDS)
    bad, *good = rows_of(path)
    assert str(bad).startswith(f"{path}:1: not JSON (")
    assert [type(row) for row in good] == [Document, Document]


def test_rows_within_an_object_are_read_in_the_memory_of_few():
    record = json.dumps({"instruction": "a" * 1000, "output": "b" * 1000}).encode()

    def opened() -> io.BufferedReader:
        return io.BufferedReader(GeneratedBytes(b'{"n": 1, "data": [', record, b"]}", 5000))  # ten megabytes

    tracemalloc.start()
    layout = find_layout(opened(), "made", ())
    count = sum(1 for _ in read_layout(layout, opened(), "made"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (layout.key, count) == ("data", 5000)
    assert peak < 5_000_000
