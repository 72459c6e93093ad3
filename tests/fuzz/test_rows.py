"""Damaged rows in every form and kind of file: each is a document or a refusal in one line, and none is lost."""

import bz2
import csv
import gzip
import io
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.sources.text import without_repeats
from data_prep.user_error import UserError
from tests.data_prep.reading import data_of, rows_of
from tests.fuzz.fuzzing import Outcomes, check_one_line, fuzz
from tests.fuzz.mutations import mutated_bytes, mutated_texts, mutated_trees, values
from tests.fuzz.test_recipes import folder_of
from tests.support.tiny_tokenizer import tiny_tokenizer

CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ROWS = [
    {"instruction": "Add 1 and 2", "input": "", "output": "3"},
    {"instruction": "Add", "input": "1 and 2", "output": "3", "history": [["Hi", "Hello"]], "system": "Be short"},
    {"prompt": "Add 1 and 2", "completion": "3"},
    {"question": "1 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "A"},
    {"text": "One two three"},
    {"messages": [{"role": "system", "content": "Be short"}, {"role": "user", "content": "1 + 2?"},
                  {"role": "assistant", "content": "3", "weight": 1}]},
    {"conversations": [{"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": "3"}], "id": 7},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
                  {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "content": "3", "tool_call_id": "a"}, {"role": "assistant", "content": "3"}],
     "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]},
    [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}],
]  # fmt: skip
ROLES = ["user", "assistant", "system", "tool", "human", "gpt", "function", "developer", "observation"]
odd_rows = mutated_trees(ROWS, values(*ROLES, [], {}, [[]], [None], [{}]))


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[Any], delimiter: str) -> bytes:
    """One column per field of the first row; cells of other kinds as JSON."""
    names = list(rows[0]) if isinstance(rows[0], dict) and rows[0] else ["text"]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) if isinstance(row, dict) else row for name in names]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return out.getvalue().encode("utf-8", "replace")


KINDS: dict[str, Callable[[list[Any]], bytes]] = {
    ".jsonl": jsonl,
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": lambda rows: table(rows, ","),
    ".tsv": lambda rows: table(rows, "\t"),
    ".txt": lambda rows: "\n\n".join(map(str, rows)).encode("utf-8", "replace"),
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def read(path: Path, outcomes: Outcomes) -> list[Any] | None:
    rows = outcomes.of(lambda: rows_of(path))
    for row in rows or []:
        if isinstance(row, UserError):
            check_one_line(str(row))
    return rows


@fuzz(0.06)
@given(rows=st.lists(odd_rows, min_size=1, max_size=3))
def test_each_line_of_json_is_a_document_or_a_refusal(rows, outcomes: Outcomes, tmp_path_factory):
    path = folder_of(tmp_path_factory) / "rows.jsonl"
    path.write_bytes(jsonl([ROWS[0], *rows]))
    found = read(path, outcomes)
    assert found is None or len(found) == 1 + len(rows)


FRAGMENTS = [
    '{"a":' * 3000, "[" * 3000, "9" * 5000, "NaN", '"', "\\", "\\ud800", "\0", "\r", "\x85", "\u2028", "{}", "null",
    "]", "}", ",", "\t",
    "version https://git-lfs.github.com/spec/v1", "<html>", '{"text": 1, "text": 2}', ";", "\ufeff",
]  # fmt: skip
FILES = {ending: write([row for row in ROWS if isinstance(row, dict)][:3]).decode() for ending, write in KINDS.items()}


@fuzz(0.06)
@given(data=st.data())
def test_files_of_every_kind_with_changed_text(data, outcomes: Outcomes, tmp_path_factory):
    ending, packing = data.draw(st.sampled_from(sorted(KINDS))), data.draw(st.sampled_from(sorted(PACKERS)))
    content = PACKERS[packing](data.draw(mutated_bytes(mutated_texts([FILES[ending]], FRAGMENTS))))
    if packing and data.draw(st.booleans()):
        where = data.draw(st.integers(0, len(content)))
        content = content[:where] + data.draw(st.binary(max_size=4)) + content[where + data.draw(st.integers(0, 4)) :]
    path = folder_of(tmp_path_factory) / f"rows{ending}{packing}"
    path.write_bytes(content)
    read(path, outcomes)


@fuzz(0.004)
@given(rows=st.lists(odd_rows, max_size=6))
@example(rows=[])
def test_rows_are_learned_held_out_or_counted_as_removed(rows, outcomes: Outcomes, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("data_prep.prepare.write_plots", lambda manifest, directory: None)  # which takes a second
    folder = tmp_path_factory.mktemp("prepare")
    path = folder / "rows.jsonl"
    path.write_bytes(jsonl([*ROWS, *rows]))
    given_config = data_of(path).model_dump() | {"prepared_dir": folder / "prepared", "cleaning": {"bad_rows": "drop"}}
    config = DataConfig.model_validate(given_config | {"held_out": 2, "seq_len": 256})
    report = outcomes.of(lambda: prepare(config, tiny_tokenizer(), say=lambda _: None))
    if report is None:
        assert not (folder / "prepared").exists()
        return
    json.dumps(report.manifest, allow_nan=False)
    kept = sum(split["tasks"]["sums"]["documents"] for split in report.manifest["splits"].values())
    removed = sum(each["documents"] for each in report.manifest["removed"]["sums"].values())
    assert kept + removed == len(ROWS) + len(rows), report.manifest


@pytest.mark.parametrize("turns", [4000])
def test_long_conversations_take_time_in_proportion(turns, tmp_path, outcomes: Outcomes):
    chat = [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(turns)]
    (tmp_path / "rows.jsonl").write_bytes(jsonl([{"messages": chat}]))
    began = time.process_time()
    read(tmp_path / "rows.jsonl", outcomes)
    assert time.process_time() - began < 4


def test_repeated_keys_are_found_in_time_in_proportion():
    pairs = [(f"key{i}", i) for i in range(20_000)]
    began = time.process_time()
    with pytest.raises(ValueError, match="key 'last' is repeated"):
        without_repeats([*pairs, ("last", 1), ("last", 2)])
    assert time.process_time() - began < 1
