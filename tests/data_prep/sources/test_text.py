"""JSON lines, a JSON array, CSV and plain text as rows; every bad row is reported with its place."""

import csv
import io
import json
import tracemalloc
from pathlib import Path

import pytest

from data_prep.documents import Document
from data_prep.sources.json_array import read_json_array
from data_prep.user_error import UserError
from tests.data_prep.reading import GeneratedBytes, places, read, refusal, rows_of, texts

GOOD = b'{"instruction": "Add 2 and 2.", "output": "4"}'
LINE = "expected one JSON object per line, correct it"
ARRAY = "expected one array of JSON objects, correct it"


def write(folder: Path, content: bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def after(path: Path, message: str) -> str:
    assert message.startswith(f"{path}")
    return message.removeprefix(f"{path}")


# JSON lines


def test_every_line_is_a_document_with_its_number(tmp_path):
    path = write(tmp_path, b'{"instruction": "a", "output": "1"}\n{"instruction": "b", "output": "2"}')
    documents = read(path)
    assert [document.origin for document in documents] == [f"{path}:1", f"{path}:2"]
    assert texts(documents) == [["a", "1"], ["b", "2"]]


def test_blank_lines_bom_and_windows_line_ends_are_skipped_but_counted(tmp_path):
    content = b"\n".join([b"\xef\xbb\xbf" + GOOD + b"\r", b"", b"  \r", GOOD, b""])
    assert places(read(write(tmp_path, content))) == [":1", ":4"]


def test_unicodes_own_line_ends_do_not_end_a_line(tmp_path):
    line = json.dumps({"instruction": "a\u2028b\x85c", "output": "1"}, ensure_ascii=False).encode()
    assert texts(read(write(tmp_path, line + b"\n" + GOOD))) == [["a\u2028b\x85c", "1"], ["Add 2 and 2.", "4"]]


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf"], ids=["empty", "blank lines", "BOM"])
def test_an_empty_file_has_no_documents(tmp_path, content):
    assert rows_of(write(tmp_path, content)) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"instruction": "a"', f"not JSON (Expecting ',' delimiter at character 20); {LINE}"),
        (b"[1, 2]", f"not a JSON object; {LINE}"),
        (b"null", f"not a JSON object; {LINE}"),
        (b"{", f"not JSON (Expecting property name enclosed in double quotes at character 2); {LINE}"),
        (GOOD + b" " + GOOD, f"not JSON (Extra data at character 47); {LINE}"),
        (GOOD + b"\r" + GOOD, f"not JSON (Extra data at character 47); {LINE}"),
        (b'{"a": ' * 100_000, f"not JSON (too many nested lists and objects); {LINE}"),
        (
            b'{"id": ' + b"1" * 5000 + b"}",
            "not JSON (Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits); " + LINE,
        ),
        (b'{"instruction": "caf\xe9", "output": "a"}', "byte e9 is not UTF-8; save the file as UTF-8"),
        (b'{"instruction": "a\0", "output": "a"}', f"not JSON (Invalid control character at character 18); {LINE}"),
        (b'{"instruction": "a", "instruction": "b"}', f"not JSON (key 'instruction' is repeated); {LINE}"),
        (b'{"messages": [{"role": "a", "role": "b"}]}', f"not JSON (key 'role' is repeated); {LINE}"),
    ],
    ids=[
        "cut off",
        "list",
        "null",
        "first line of a pretty-printed object",
        "two objects",
        "two objects between old line ends",
        "too deep",
        "huge number",
        "Latin-1",
        "zero byte",
        "key twice",
        "key twice within",
    ],
)
def test_a_bad_line_is_refused_with_its_place(tmp_path, line, expected):
    path = write(tmp_path, GOOD + b"\n\n" + line + b"\n" + GOOD)
    assert refusal(path) == f"{path}:3: {expected}"
    assert [type(row) for row in rows_of(path)] == [Document, UserError, Document]


def test_a_line_of_ten_megabytes_is_one_document(tmp_path):
    path = write(tmp_path, json.dumps({"instruction": "a", "output": "b" * 10_000_000}).encode() + b"\n" + GOOD)
    assert [len(turns[1]) for turns in texts(read(path))] == [10_000_000, 1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD.decode().encode("utf-16"), ":1: the file is UTF-16; save it as UTF-8"),
        (GOOD.decode().encode("utf-16-be"), ":1: the file holds zero bytes, so it is not text; save it as UTF-8 text"),
        (GOOD.decode().encode("utf-32"), ":1: the file is UTF-16; save it as UTF-8"),
        (b"\x7fELF\x02\x01\x01\0\0\0\0", ":1: the file holds zero bytes, so it is not text; save it as UTF-8 text"),
    ],
    ids=["UTF-16 with BOM", "UTF-16 without", "UTF-32", "no text"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_file_in_another_encoding_is_refused_whole(tmp_path, name, content, expected):
    path = write(tmp_path, content, name)
    assert refusal(path) == f"{path}{expected}"


# a JSON array

TRICKY = [
    {"instruction": 'brackets ]}[{ and "quotes" \\', "output": "\\\\"},
    {"instruction": "é\u2028 😀", "output": "1", "more": [[], {}, {"": [{"a": None}]}], "n": [1.5e3, -2, True]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b]"}]},
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_an_array_reads_as_its_lines_would(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr("data_prep.sources.json_array._CHUNK", chunk)
    lines = write(tmp_path, "\n".join(map(json.dumps, TRICKY)).encode())
    array = write(tmp_path, b"\xef\xbb\xbf\n " + json.dumps(TRICKY, indent=indent).encode() + b"\r\n", "data.json")
    documents = read(array)
    assert places(documents) == ["[0]", "[1]", "[2]"]
    assert texts(documents) == texts(read(lines))
    assert [json.loads(row) for _, row in read_json_array(io.BytesIO(array.read_bytes()), "")] == TRICKY


def test_a_file_of_lines_may_be_called_json_and_one_of_an_array_jsonl(tmp_path):
    assert places(read(write(tmp_path, GOOD + b"\n" + GOOD, "a.json"))) == [":1", ":2"]
    assert places(read(write(tmp_path, b"[" + GOOD + b"," + GOOD + b"]", "a.jsonl"))) == ["[0]", "[1]"]


def test_an_empty_array_has_no_documents(tmp_path):
    assert rows_of(write(tmp_path, b" [ ]\n")) == []


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (b"[%s, {", "[1]: the array has no end; the file is cut off or a quote is missing"),
        (b"[%s", "[1]: the array has no end; the file is cut off or a quote is missing"),
        (b'[%s, {"instruction": "a', "[1]: the array has no end; the file is cut off or a quote is missing"),
        (b"[", "[0]: the array has no end; the file is cut off or a quote is missing"),
        (b"[1, 2]", f"[0]: found '1, 2]' in place of an object; {ARRAY}"),
        (b'["a{b}"]', f"[0]: found '\"a{{b}}\"]' in place of an object; {ARRAY}"),
        (b"[%s, null]", f"[1]: found ', null]' in place of a comma and an object; {ARRAY}"),
        (b"[%s, [1]]", f"[1]: not a JSON object; {ARRAY}"),
        (b"[%s,]", f"[1]: found ',]' in place of a comma and an object; {ARRAY}"),
        (b"[%s %s]", f"[1]: found '{{' in place of a comma and an object; {ARRAY}"),
        (b"[%s}", f"[1]: found '}}' in place of a comma and an object; {ARRAY}"),
        (b"[%s]%s", ": found '{' after the end of the array; remove it"),
        (b"[%s]\nend", ": found 'end' after the end of the array; remove it"),
        (b'[%s, {"a": 1, "a": 2}]', f"[1]: not JSON (key 'a' is repeated); {ARRAY}"),
        (b'[%s, {"a": NUL}]', f"[1]: not JSON (Expecting value at character 6); {ARRAY}"),
        (b'[%s, {"a": 1]]', f"[1]: not JSON (Expecting ',' delimiter at character 7); {ARRAY}"),
        (b'[%s, {"a": "caf\xe9"}]', "[1]: byte e9 is not UTF-8; save the file as UTF-8"),
        (b'[%s, {"a": ' + b"[" * 100_000, "[1]: over 100 nested lists and objects; simplify it"),
    ],
)
def test_a_damaged_array_is_refused_at_its_first_bad_element(tmp_path, array, expected):
    path = write(tmp_path, array.replace(b"%s", GOOD), "data.json")
    assert refusal(path) == f"{path}{expected}"


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
@pytest.mark.parametrize(
    "bad",
    [
        b'{"a": NUL}',
        b'{"a": "\\d ]"}',
        b"{'a': 1}",
        b'{"a": 1]',
        b'{"a": "\xe9"}',
        b'{"n": ' + b"1" * 5000 + b"}",
        b"[{}]",
    ],
    ids=["no value", "unknown escape", "other quotes", "other bracket", "Latin-1", "huge number", "list"],
)
def test_elements_after_one_that_is_not_json_are_still_found(tmp_path, monkeypatch, bad, chunk):
    monkeypatch.setattr("data_prep.sources.json_array._CHUNK", chunk)
    path = write(tmp_path, b"[" + b",\n".join([GOOD, bad, GOOD]) + b"]", "data.json")
    first, second, third = rows_of(path)
    assert places([first, third]) == ["[0]", "[2]"]
    assert str(second).startswith(f"{path}[1]: ")


def test_an_array_holds_half_surrogates_as_lines_do(tmp_path):
    path = write(tmp_path, b'[{"instruction": "a", "output": "\\ud83d\\u0041"}]')  # some parsers make it one character
    assert refusal(path) == f"{path}[0]: field `output` holds half a surrogate pair at character 0; remove it"


def test_an_array_is_read_in_the_memory_of_few_records():
    record = json.dumps({"instruction": "a" * 1000, "output": "b" * 1000}).encode()

    array = GeneratedBytes(b"[", record, b"]", 5000)  # ten megabytes
    tracemalloc.start()
    count = sum(1 for _ in read_json_array(io.BufferedReader(array), "made"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5000
    assert peak < 5_000_000


def test_long_strings_with_escapes_in_an_array_are_read_whole(tmp_path):
    output = '\n"[' * 1_000_000
    path = write(tmp_path, json.dumps([{"instruction": "a", "output": output}]).encode())
    assert texts(read(path)) == [["a", output]]


# CSV


def test_a_table_reads_as_it_was_written(tmp_path):
    rows = [["What, is it?", "1"], ['a "quoted"\ttext', "two\nlines"], ["é", "4"]]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["instruction", "output"], *rows])
    documents = read(tmp_path / "a.csv")
    assert texts(documents) == rows
    assert places(documents) == [":2", ":3", ":5"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_blank_lines_of_a_table_are_skipped_but_counted(tmp_path, end):
    path = write(tmp_path, end.join(["", "instruction,output", "", "a,1", "", "b,2"]).encode(), "a.csv")
    documents = read(path)
    assert texts(documents) == [["a", "1"], ["b", "2"]]
    assert places(documents) == [":4", ":6"]


def test_columns_can_hold_json(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "id"], [json.dumps(turns), "1"]])
    (document,) = read(tmp_path / "a.csv")
    assert document.messages == turns


def test_bad_rows_of_a_table_are_reported_and_the_others_read(tmp_path):
    rows = [b"a" * 64 + b",1", b"b,2,3", b"c", b"caf\xe9,4", b'"d\nd",\0', b"e,5"]
    path = write(tmp_path, b"\n".join([b"instruction,output", *rows]), "a.csv")
    assert [str(row) if isinstance(row, UserError) else texts([row])[0] for row in rows_of(path)] == [
        ["a" * 64, "1"],
        f"{path}:3: 3 values in 2 columns; correct the row or its quotes",
        f"{path}:4: 1 values in 2 columns; correct the row or its quotes",
        f"{path}:5: byte e9 is not UTF-8; save the file as UTF-8",
        f"{path}:6: holds a zero byte, so it is not text; remove the byte",
        ["e", "5"],
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'instruction,output\na,1\n"b,2\nc,3\n', ":3: not a table (unexpected end of data); correct the row or its"),
        (b'instruction,output\na,1\n"b"c,2\n', ":3: not a table (',' expected after '\"'); correct the row or its"),
        (b"text,id,text\na,1,b\n", ":1: column 'text' is repeated; rename one"),
        (b"caf\xe9,text\na,1\n", ":1: byte e9 is not UTF-8; save the file as UTF-8"),
    ],
    ids=["quote that does not end", "text after a quote", "column twice", "Latin-1 header"],
)
def test_a_damaged_table_is_refused_with_its_place(tmp_path, content, expected):
    path = write(tmp_path, content, "a.csv")
    assert after(path, refusal(path)).startswith(expected)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize(
    ("name", "header", "expected"),
    [
        ("a.csv", b"instruction\toutput", "tabs; set the source's `format: tsv`"),
        ("a.tsv", b"instruction,output", "commas; set the source's `format: csv`"),
        ("a.csv", b"instruction;output", "semicolons; save the file as CSV with commas, or as JSON lines"),
        ("a.csv", b'"instruction";"output"', "semicolons; save the file as CSV with commas, or as JSON lines"),
        ("a.tsv", b"instruction|output", "bars; save the file as CSV with commas, or as JSON lines"),
    ],
)
def test_another_delimiter_is_named(tmp_path, name, header, expected, bom):
    path = write(tmp_path, bom + b"\r\n" + header + b"\r\na,1\r\n", name)
    assert refusal(path) == f"{path}:2: the header's columns are separated by {expected}"


def test_a_table_of_one_column_may_hold_any_text(tmp_path):
    path = write(tmp_path, b'text\n"a, b; c"\nd\te|f\n', "a.csv")
    assert texts(read(path)) == ["a, b; c", "d\te|f"]


def test_a_table_of_a_header_only_has_no_documents(tmp_path):
    assert rows_of(write(tmp_path, b"instruction,output\r\n", "a.csv")) == []


# plain text

TEXT = b"\xef\xbb\xbf  One.\r\nTwo.\r\n\r\n \t\r\n    Three.\r\n"


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("document", {":1": "  One.\nTwo.\n\n \t\n    Three."}),
        ("paragraph", {":1": "  One.\nTwo.", ":5": "    Three."}),
        ("line", {":1": "  One.", ":2": "Two.", ":5": "    Three."}),
    ],
)
def test_plain_text_is_cut_into_documents_and_keeps_its_indentation(tmp_path, sample_by, expected):
    documents = read(write(tmp_path, TEXT, "a.txt"), sample_by=sample_by)
    assert dict(zip(places(documents), texts(documents), strict=True)) == expected
    assert {document.form for document in documents} == {"text"}


@pytest.mark.parametrize("sample_by", ["paragraph", "line"])
def test_only_the_bad_pieces_of_a_text_are_refused(tmp_path, sample_by):
    one = "One and more; a zero byte in the first 64 bytes would tell that the file is no text at all."
    path = write(tmp_path, one.encode() + b"\n\ncaf\xe9\n\nTwo\0.\n\nThree.\n", "a.txt")
    assert [str(row) if isinstance(row, UserError) else row.text for row in rows_of(path, sample_by=sample_by)] == [
        one,
        f"{path}:3: byte e9 is not UTF-8; save the file as UTF-8",
        f"{path}:5: holds a zero byte, so it is not text; remove the byte",
        "Three.",
    ]


def test_a_text_too_large_for_one_document_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.text.LONGEST", 2**20)
    path = write(tmp_path, (b"a" * 1023 + b"\n") * 1024 + b"b", "a.txt")
    assert refusal(path) == f"{path}: over 1 MiB in one document; set sample_by: paragraph or line"
    assert len(read(path, sample_by="line")) == 1025
