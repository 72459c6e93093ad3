"""Damaged rows never go unnoticed: the first ends `prepare` with one line that names its place, or all are dropped and
counted with theirs, as data.cleaning.bad_rows says.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.user_error import UserError
from tests.data_prep.reading import refusal
from tests.support.tiny_tokenizer import tiny_tokenizer

GOOD = b'{"instruction": "Add 2 and 2.", "output": "4"}'
CHAT = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
LINES = b"".join(b'{"instruction": "Add %d and 2.", "output": "4"}\n' % number for number in range(50))


def config_of(folder: Path, files: dict[str, Path], **keys: Any) -> DataConfig:
    """The data section with one source per task, and without held-out documents."""
    sources = [{"type": "files", "task": task, "path": path} for task, path in files.items()]
    return DataConfig(prepared_dir=folder / "prepared", seq_len=64, held_out=1e-9, sources=sources, **keys)


def write(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def ends_with(config: DataConfig, tokenizer: Any) -> str:
    """The one line with which `prepare` ends; nothing is left of its work."""
    with pytest.raises(UserError) as caught:
        prepare(config, tokenizer)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert not config.prepared_dir.exists()
    return message


def parquet_of(records: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


def zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


# Bad rows, by kind: the file's ending, its content, the places of the bad rows, and the message about the first. Every
# file also has a good row.


def lines(*bad: bytes) -> bytes:
    return b"\n".join([GOOD, *bad, CHAT])


def turns(messages: str) -> bytes:
    return lines(b'{"messages": %s}' % messages.encode())


QUESTION = '{"role": "user", "content": "a"}'
BAD_ROWS: dict[str, tuple[str, bytes, list[str], str]] = {
    "Latin-1": (".jsonl", lines(b'{"instruction": "caf\xe9", "output": "a"}'), [":2"], "byte e9 is not UTF-8; save"),
    "cut off": (
        ".jsonl",
        lines() + b'\n{"instruction": "a", "out',
        [":3"],
        "not JSON (Unterminated string starting at",
    ),
    "lone CR": (".jsonl", lines(GOOD + b"\r" + GOOD), [":2"], "not JSON (Extra data at character 47)"),
    "pretty-printed": (
        ".jsonl",
        lines(*json.dumps({"instruction": "a", "output": "b"}, indent=1).encode().splitlines()),
        [":2", ":3", ":4", ":5"],
        "not JSON (Expecting property name enclosed in double quotes at character 2); expected one JSON object per",
    ),
    "array among lines": (
        ".jsonl",
        lines(b"[" + GOOD + b"]"),
        [":2"],
        "not a JSON object; expected one JSON object per line, correct it",
    ),
    "number": (".jsonl", lines(b"7"), [":2"], "not a JSON object; expected one JSON object per line, correct it"),
    "too deep": (".jsonl", lines(b"[" * 100_000), [":2"], "not JSON (too many nested lists and objects)"),
    "huge number": (".jsonl", lines(b'{"id": ' + b"1" * 5000 + b"}"), [":2"], "not JSON (Exceeds the limit"),
    "NaN": (".jsonl", lines(b'{"instruction": "a", "output": NaN}'), [":2"], "field `output` is nan; expected text"),
    "infinity": (".jsonl", lines(b'{"instruction": "a", "output": 1e999}'), [":2"], "field `output` is inf; expected"),
    "zero byte": (".jsonl", lines(b'{"instruction": "a\0", "output": "b"}'), [":2"], "not JSON (Invalid control char"),
    "key twice": (
        ".jsonl",
        lines(b'{"instruction": "a", "output": "b", "output": "c"}'),
        [":2"],
        "not JSON (key 'output' is repeated)",
    ),
    "half a surrogate pair": (
        ".jsonl",
        lines(b'{"instruction": "\\ud83d", "output": "b"}'),
        [":2"],
        "field `instruction` holds half a surrogate pair at character 0; remove it",
    ),
    "missing field": (".jsonl", lines(b'{"instruction": "a"}'), [":2"], "lacks field `output`; it has ['instruction']"),
    "unknown fields": (".jsonl", lines(b'{"question": "a"}'), [":2"], "fields ['question']; expected `messages` or"),
    "no fields": (".jsonl", lines(b"{}"), [":2"], "fields []; expected `messages` or"),
    "null answer": (
        ".jsonl",
        lines(b'{"instruction": "a", "output": null}'),
        [":2"],
        "field `output` is null; expected",
    ),
    "null text": (".jsonl", lines(b'{"text": null}'), [":2"], "field `text` is null; correct or remove the record"),
    "preference": (
        ".jsonl",
        lines(b'{"prompt": "a", "chosen": "b", "rejected": "c"}'),
        [":2"],
        "a preference row (chosen, rejected), but this trainer learns from answers",
    ),
    "no messages": (".jsonl", turns("[]"), [":2"], "messages is an empty list; expected a list of one or more turns"),
    "messages a text": (".jsonl", turns('"Hi"'), [":2"], "messages is text; expected a list of one or more turns"),
    "turn of null": (".jsonl", turns(f"[{QUESTION}, null]"), [":2"], "messages[1] is null; expected an object with"),
    "turn without content": (
        ".jsonl",
        turns(f'[{QUESTION}, {{"role": "assistant", "content": null}}]'),
        [":2"],
        "messages[1]: lacks field `content`; it has ['role'], add the field",
    ),
    "image": (
        ".jsonl",
        turns('[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]'),
        [":2"],
        "messages[0]: `content` has a part of type 'image_url'; expected parts of type text, ",
    ),
    "arguments cut off": (
        ".jsonl",
        turns(f'[{QUESTION}, {{"role": "assistant", "tool_calls": [{{"name": "f", "arguments": "{{"}}]}}]'),
        [":2"],
        "messages[1]: tool call 0: `arguments` is text; expected an object, or one as JSON text",
    ),
    "ragged row": (
        ".csv",
        b"instruction,output\na,1\nb,2,3\nc\nd,4\n",
        [":3", ":4"],
        "3 values in 2 columns; correct the row or its quotes",
    ),
    "Latin-1 row": (".csv", b"instruction,output\na,1\ncaf\xe9,2\n", [":3"], "byte e9 is not UTF-8; save the file as"),
    "null in Parquet": (
        ".parquet",
        parquet_of([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}]),
        ["[1]"],
        "lacks field `output`; it has ['instruction'], add it, or name it under the source's `fields`",
    ),
    "nested null in Parquet": (
        ".parquet",
        parquet_of(
            [json.loads(CHAT), {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}]
        ),
        ["[1]"],
        "messages[1]: lacks field `content`; it has ['role'], add the field",
    ),
    "list in Parquet": (
        ".parquet",
        parquet_of([{"text": ["a"], "prompt": None, "completion": None}, {"prompt": "a", "completion": "b"}]),
        ["[0]"],
        "field `text` is list; expected text, put it in quotes",
    ),
    "list in an array": (
        ".json",
        b"[%s, [1]]" % GOOD,
        ["[1]"],
        "not a JSON object; expected one array of JSON objects",
    ),
    "key twice in an array": (
        ".json",
        b'[%s, {"text": "a", "text": "b"}, %s]' % (GOOD, CHAT),
        ["[1]"],
        "not JSON (key 'text' is repeated); expected one array of JSON objects, correct it",
    ),
    "half a surrogate pair in an array": (
        ".json",
        b'[%s, {"instruction": "\\ud83d\\u0041", "output": "b"}]' % GOOD,
        ["[1]"],
        "field `instruction` holds half a surrogate pair at character 0; remove it",
    ),
}
# Valid rows with nothing to learn from: dropped and counted, whatever bad_rows is.
NOTHING_TO_LEARN: dict[str, tuple[str, bytes, list[str], str]] = {
    "empty answer": (".jsonl", lines(b'{"instruction": "a", "output": ""}'), [":2"], "empty_answer"),
    "answer of blanks": (".jsonl", lines(b'{"instruction": "a", "output": " \\n\\t"}'), [":2"], "empty_answer"),
    "empty text": (".jsonl", lines(b'{"text": " "}'), [":2"], "empty_answer"),
    "no answer": (".jsonl", turns(f"[{QUESTION}]"), [":2"], "no_assistant_turn"),
    "answer given": (
        ".jsonl",
        turns(f'[{QUESTION}, {{"role": "assistant", "content": "b", "weight": 0}}]'),
        [":2"],
        "no_assistant_turn",
    ),
}
# Unusual but valid files: all documents are read.
READ: dict[str, tuple[str, bytes, int]] = {
    "BOM": (".jsonl", b"\xef\xbb\xbf" + GOOD + b"\n" + CHAT, 2),
    "CRLF": (".jsonl", b"\r\n".join([GOOD, b"", CHAT, b""]), 2),
    "blank lines": (".jsonl", b"\n \n" + GOOD + b"\n\t\n\n" + CHAT, 2),
    "mixed forms": (".jsonl", b"\n".join([GOOD, CHAT, b'{"text": "a"}', b'{"prompt": "a", "completion": "b"}']), 4),
    "line of 10 MB": (".jsonl", lines(b'{"text": "a", "id": "' + b"x" * 10_000_000 + b'"}'), 3),
    "array called jsonl": (".jsonl", b"[" + GOOD + b", " + CHAT + b"]", 2),
    "lines called json": (".json", GOOD + b"\n" + CHAT, 2),
    "CSV of CRs": (".csv", b"instruction,output\ra,1\rb,2\r", 2),
    "numbers for answers": (".jsonl", b'{"instruction": "a", "output": 4}', 1),
    "escaped zero": (".jsonl", b'{"instruction": "a\\u0000", "output": "b"}', 1),
}


@pytest.fixture(scope="module")
def dropped(tmp_path_factory, tokenizer) -> dict[str, Any]:
    """Manifest and files of one set of all kinds of bad rows, one task a kind, with bad_rows: drop."""
    folder = tmp_path_factory.mktemp("dropped")
    kinds = {**BAD_ROWS, **NOTHING_TO_LEARN, **READ}
    files = {kind: write(folder / str(i), "data" + of[0], of[1]) for i, (kind, of) in enumerate(kinds.items())}
    (folder / "loop").mkdir()
    write(folder / "loop", "a.jsonl", GOOD)
    (folder / "loop/again").symlink_to(folder / "loop")
    files["loop of folders"] = folder / "loop"
    config = config_of(folder, files, cleaning={"bad_rows": "drop", "duplicates": "keep"})
    manifest = prepare(config, tokenizer).manifest
    documents = {task: found["documents"] for task, found in manifest["splits"]["train"]["tasks"].items()}
    return {"manifest": manifest, "files": files, "documents": documents, "removed": manifest["removed"]}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_dropped_row_is_counted_with_its_place_and_what_is_wrong(dropped, kind):
    _, content, places, expected = BAD_ROWS[kind]
    path = dropped["files"][kind]
    (removed,) = dropped["removed"][kind].values()
    assert list(dropped["removed"][kind]) == ["bad_row"]
    assert removed["documents"] == len(places)
    assert [message.removeprefix(str(path)).partition(": ")[0] for message in removed["first"]] == places
    assert removed["first"][0].startswith(f"{path}{places[0]}: {expected}")
    assert dropped["documents"][kind] + len(places) == rows_in(path, content)


def rows_in(path: Path, content: bytes) -> int:
    """How many rows a file of BAD_ROWS has, found without the code under test."""
    if path.suffix == ".parquet":
        return parquet.read_metadata(path).num_rows
    if path.suffix == ".json":
        return len(json.loads(content))
    return len(content.strip().split(b"\n")) - (path.suffix == ".csv")


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_the_same_row_is_refused_where_bad_rows_are(dropped, kind):
    path, places, expected = dropped["files"][kind], *BAD_ROWS[kind][2:]
    assert refusal(path).startswith(f"{path}{places[0]}: {expected}")


def test_prepare_ends_with_the_first_bad_row_and_leaves_nothing(tmp_path, tokenizer):
    path = write(tmp_path, "data.jsonl", GOOD + b"\n" + b"{\n" + b"7\n")
    assert ends_with(config_of(tmp_path, {"sums": path}), tokenizer).startswith(f"{path}:2: not JSON (Expecting prop")


@pytest.mark.parametrize("kind", NOTHING_TO_LEARN)
def test_rows_that_teach_nothing_are_counted_by_reason(dropped, kind):
    _, _, places, reason = NOTHING_TO_LEARN[kind]
    first = [f"{dropped['files'][kind]}{place}" for place in places]
    assert dropped["removed"][kind] == {reason: {"documents": len(places), "first": first}}
    assert dropped["documents"][kind] == 2


@pytest.mark.parametrize("kind", [*READ, "loop of folders"])
def test_what_is_merely_odd_is_read_whole(dropped, kind):
    assert dropped["removed"][kind] == {}
    assert dropped["documents"][kind] == (READ[kind][2] if kind in READ else 1)


def test_unexpected_properties_of_the_data_are_noted(dropped):
    notes = "\n".join(dropped["manifest"]["notes"])
    number = list(dropped["files"]).index("mixed forms")
    assert (
        f"data.sources.{number} holds records of several forms: 1 Alpaca, 1 chat, 1 text, 1 prompt and compl" in notes
    )
    number = list(dropped["files"]).index("loop of folders")
    assert f"data.sources.{number}: 1 files or linked folders skipped, the first is " in notes


REFUSING = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role ' + m['role']) }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_role_that_the_template_does_not_know_is_refused_with_its_place(tmp_path):
    answer = '{"role": "assistant", "content": "b"}'
    path = write(tmp_path, "a.jsonl", turns(f'[{QUESTION}, {answer}, {{"role": "tool", "content": "c"}}]'))
    message = ends_with(config_of(tmp_path, {"sums": path}), tiny_tokenizer(REFUSING))
    assert message.startswith(f"{path}:2: ")
    assert "Unknown role tool" in message


def test_a_role_that_the_template_does_not_know_can_be_dropped_and_is_counted(tmp_path):
    answer = '{"role": "assistant", "content": "b"}'
    lines = turns(f'[{QUESTION}, {answer}, {{"role": "tool", "content": "c"}}]')
    path = write(tmp_path, "a.jsonl", lines)
    config = config_of(tmp_path, {"sums": path}, cleaning={"bad_rows": "drop"})
    removed = prepare(config, tiny_tokenizer(REFUSING)).manifest["removed"]["sums"]["bad_row"]
    (place,) = removed["first"]
    assert removed["documents"] == 1
    assert place.startswith(f"{path}:2: ")
    assert "Unknown role tool" in place
