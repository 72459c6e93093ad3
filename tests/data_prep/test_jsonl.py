"""JSONL sources: both forms become turns, and every bad line is told as file:line in one line of text."""

import json
import re
from pathlib import Path

import pytest

from data_prep.config import JsonlSource
from data_prep.documents import Document
from data_prep.errors import UserError
from data_prep.jsonl import read_jsonl

GOOD = b'{"instruction": "Add 2 and 2.", "output": "4"}'
GOOD_CHAT = b'{"messages": [{"role": "user", "content": "Hi"}]}'


def read(path: Path) -> list[Document]:
    return list(read_jsonl(JsonlSource(type="jsonl", task="sums", path=path), "data.sources.0.path"))


def read_lines(folder: Path, *lines: bytes) -> list[Document]:
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    return read(path)


def refused(message: str, call, *arguments) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "question"),
    [
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, "Add.\n\n2 2"),
        ({"instruction": "Add 2 2.", "input": "", "output": "4"}, "Add 2 2."),
        ({"instruction": "Add 2 2.", "input": None, "output": "4"}, "Add 2 2."),
        ({"instruction": "Add 2 2.", "output": "4", "source": 3}, "Add 2 2."),
    ],
    ids=["with input", "empty input", "null input", "unknown field"],
)
def test_alpaca_form_becomes_a_question_and_an_answer(tmp_path, fields, question):
    (document,) = read_lines(tmp_path, json.dumps(fields).encode())
    assert document.task == "sums"
    assert document.messages == [{"role": "user", "content": question}, {"role": "assistant", "content": "4"}]
    assert document.origin == f"{tmp_path}/data.jsonl:1"


def test_chat_form_keeps_its_turns_as_they_stand(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " é\u2028 "},
        {"role": "assistant", "content": "<|im_end|>\n"},
    ]
    record = {"messages": [{**turn, "name": "x"} for turn in turns], "id": 1}
    (document,) = read_lines(tmp_path, json.dumps(record, ensure_ascii=False).encode())
    assert document.messages == turns


def test_blank_lines_bom_and_windows_line_ends_are_passed_over_and_counted(tmp_path):
    documents = read_lines(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r", b"", b"  \r", GOOD, b"")
    assert [document.origin.rpartition(":")[2] for document in documents] == ["1", "4"]


def test_an_empty_file_has_no_documents(tmp_path):
    assert read_lines(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"instruction": "a"', r"not JSON \(Expecting ',' delimiter.*correct the line"),
        (b"[" * 100_000, r"not JSON \(maximum recursion depth.*correct the line"),
        (b'{"id": ' + b"1" * 5000 + b"}", r"not JSON \(Exceeds the limit.*correct the line"),
        (b'{"instruction": "caf\xe9", "output": "a"}', r"byte e9 is not UTF-8; save the file as UTF-8"),
        (b"[1, 2]", r"a JSON list; expected one JSON object a line"),
        (b"null", r"a JSON null; expected one JSON object a line"),
        (b'{"instruction": "a"}', r"lacks field `output`; it has \['instruction'\], add the field"),
        (b'{"instruction": "a", "output": null}', r"field `output` is null; expected text"),
        (b'{"instruction": "a", "output": 4}', r"field `output` is number; expected text, put it in quotes"),
        (b'{"instruction": "a", "input": ["b"], "output": "4"}', r"field `input` is list; expected text"),
        (b'{"instruction": "a", "output": "\\ud83d"}', r"field `output` holds half a surrogate pair at character 0"),
    ],
    ids=[
        "cut off",
        "too deep",
        "huge number",
        "Latin-1",
        "list",
        "null",
        "no output",
        "null output",
        "number",
        "list of inputs",
        "half a surrogate pair",
    ],
)
def test_bad_alpaca_line_is_refused_with_its_place(tmp_path, line, message):
    refused(rf"^{re.escape(str(tmp_path))}/data\.jsonl:3: {message}", read_lines, tmp_path, GOOD, b"", line)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("null", r"field `messages` is null; expected a list of one or more turns"),
        ("[]", r"field `messages` is an empty list; expected a list of one or more turns"),
        ('"Hi"', r"field `messages` is text; expected a list of one or more turns"),
        ('["Hi"]', r"messages\[0\] is text; expected an object with `role` and `content`"),
        ('[{"role": "user"}]', r"messages\[0\]: lacks field `content`; it has \['role'\]"),
        ('[{"role": "user", "content": []}]', r"messages\[0\]: field `content` is an empty list; expected text"),
        ('[{"role": true, "content": "a"}]', r"messages\[0\]: field `role` is true or false; expected text"),
    ],
)
def test_bad_chat_line_is_refused_with_its_place(tmp_path, messages, message):
    line = f'{{"messages": {messages}}}'.encode()
    refused(rf"/data\.jsonl:2: {message}", read_lines, tmp_path, GOOD_CHAT, line)


@pytest.mark.parametrize(("first", "second"), [(GOOD, GOOD_CHAT), (GOOD_CHAT, GOOD)])
def test_the_form_of_the_first_line_holds_for_the_file(tmp_path, first, second):
    refused(r"/data\.jsonl:2: ", read_lines, tmp_path, first, second)


def test_unknown_form_is_refused_with_both_forms_named(tmp_path):
    expected = r":1: fields \['answer', 'question'\]; expected `instruction` and `output` \(Alpaca form\) or `messages`"
    refused(expected, read_lines, tmp_path, b'{"question": "a", "answer": "b"}')


@pytest.mark.parametrize(("name", "reason"), [("none.jsonl", "No such file"), (".", "Is a directory")])
def test_file_that_cannot_be_read_is_refused_with_its_key(tmp_path, name, reason):
    refused(
        rf"^data\.sources\.0\.path: cannot read .*{reason}.*; expected a readable JSONL file", read, tmp_path / name
    )
