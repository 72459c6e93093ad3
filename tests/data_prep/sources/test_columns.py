"""Parquet and Arrow: records as written, without nulls of the table, and one-line errors for damaged files."""

import pickle
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data_prep.config import HubSource
from data_prep.sources.blocks import Unreadable
from data_prep.sources.columns import read_arrow, read_hub, read_parquet
from data_prep.user_error import UserError
from tests.data_prep.reading import places, read, refusal, rows_of, texts

TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
    {"role": "tool", "content": "b"},
    {"role": "assistant", "content": "c"},
]


def write_parquet(path: Path, table: pyarrow.Table) -> None:
    parquet.write_table(table, path, row_group_size=5)


def write_file(path: Path, table: pyarrow.Table) -> None:
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def write_stream(path: Path, table: pyarrow.Table) -> None:
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def records(path: Path) -> list[dict | Unreadable]:
    return [row for _, row in (read_parquet(path) if path.suffix == ".parquet" else read_arrow(path))]


WRITERS = [("a.parquet", write_parquet), ("file.arrow", write_file), ("stream.arrow", write_stream)]
each_format = pytest.mark.parametrize(("name", "write"), WRITERS, ids=["Parquet", "Arrow file", "Arrow stream"])


@each_format
def test_records_come_in_order_with_their_numbers(tmp_path, monkeypatch, name, write):
    monkeypatch.setattr("data_prep.sources.columns._ROWS", 3)
    write(tmp_path / name, pyarrow.table({"instruction": list("abcdefghijkl"), "output": list(range(12))}))
    documents = read(tmp_path / name)
    assert texts(documents) == [[question, str(number)] for number, question in enumerate("abcdefghijkl")]
    assert places(documents) == [f"[{number}]" for number in range(12)]


@each_format
def test_nulls_that_only_fill_up_table_rows_are_removed(tmp_path, name, write):
    records = [
        {"messages": TURNS, "instruction": None, "output": None},
        {"messages": None, "instruction": "a", "output": "b"},
    ]
    write(tmp_path / name, pyarrow.Table.from_pylist(records))
    chat, alpaca = read(tmp_path / name)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert chat.messages == [TURNS[0], {"role": "assistant", "tool_calls": [call]}, *TURNS[2:]]
    assert texts([alpaca]) == [["a", "b"]]


@each_format
def test_a_record_keeps_values_that_are_merely_empty(tmp_path, name, write):
    value = {"a": None, "b": [{"c": None, "d": 0}, None], "e": "", "f": {"g": None}, "h": [[], [""]]}
    write(tmp_path / name, pyarrow.Table.from_pylist([value]))
    assert records(tmp_path / name) == [{"b": [{"d": 0}, None], "e": "", "f": {}, "h": [[], [""]]}]


@each_format
def test_whole_numbers_stored_as_floats_become_whole_numbers_again(tmp_path, name, write):
    numbers = [4.0, -0.0, 2.5, 1e300, None]
    choices = [[4.0, 5.0]] * len(numbers)
    columns = {"instruction": list("abcde"), "output": numbers, "choices": choices}
    write(tmp_path / name, pyarrow.table(columns))
    *documents, _ = rows_of(tmp_path / name)
    assert texts(documents) == [["a", "4"], ["b", "0"], ["c", "2.5"], ["d", "1e+300"]]
    assert [document.choices for document in documents] == [("4", "5"), (), (), ()]


@each_format
def test_a_null_where_text_belongs_is_a_bad_row_like_any_other(tmp_path, name, write):
    write(tmp_path / name, pyarrow.table({"instruction": ["a", "b", None], "output": ["1", None, None]}))
    good, no_output, nothing = rows_of(tmp_path / name)
    assert texts([good]) == [["a", "1"]]
    place = tmp_path / name
    assert str(no_output).startswith(f"{place}[1]: lacks field `output`; it has ['instruction'], add it, or name it")
    assert str(nothing).startswith(f"{place}[2]: fields []; expected `messages`")


def test_a_folder_saved_by_datasets_is_read_shard_by_shard(tmp_path):
    from datasets import Dataset, disable_progress_bars, load_from_disk

    disable_progress_bars()
    records = [{"instruction": f"a{i}", "output": f"{i}"} for i in range(10)]
    Dataset.from_list(records).save_to_disk(tmp_path / "saved", num_shards=2)
    load_from_disk(tmp_path / "saved").map(lambda record: {"more": 1})  # leaves a cache file with the same rows
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) == 1
    assert texts(read(tmp_path / "saved")) == [[f"a{i}", f"{i}"] for i in range(10)]


@each_format
def test_every_cut_file_is_refused(tmp_path, name, write):
    path = tmp_path / name
    write(path, pyarrow.table({"instruction": list("abcdefghijkl"), "output": list("123456789012")}))
    whole = path.read_bytes()
    for length in range(0, len(whole), 8):  # batches of a stream end at multiples of 8 bytes
        path.write_bytes(whole[:length])
        assert f"{path}" in refusal(path)


def test_a_stream_cut_between_two_batches_is_refused(tmp_path):
    path = tmp_path / "a.arrow"
    write_stream(path, pyarrow.table({"instruction": list("abcdefghijkl"), "output": list("123456789012")}))
    path.write_bytes(path.read_bytes()[:-8])  # all but the end mark
    assert refusal(path) == (
        f"{path}, from record 12 on: not a readable Arrow file (the stream is cut off, or does not end with its end "
        "mark); download it again, or correct its format"
    )


def test_two_streams_in_one_file_are_refused_not_half_read(tmp_path):
    path = tmp_path / "a.arrow"
    write_stream(path, pyarrow.table({"text": ["a"]}))
    path.write_bytes(path.read_bytes() * 2)
    assert "does not end with its end mark" in refusal(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"{}", b'{"text": "a"}\n' * 1000, bytes(range(256)) * 20])
def test_a_file_that_is_not_a_table_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    kind = "Parquet" if name == "a.parquet" else "Arrow"
    assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: not a readable {kind} file (")


def test_damaged_offsets_in_an_arrow_file_are_refused_without_a_crash(tmp_path):
    path = tmp_path / "a.arrow"
    write_file(path, pyarrow.table({"text": ["abcd"] * 5}))
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 4, 8, 12, 16, 20))
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f" + offsets[12:]))
    assert refusal(path).startswith(
        f"{path}: not a readable Arrow file (In column 0: Invalid: Offset invariant failure"
    )


@each_format
def test_text_that_is_not_utf8_is_refused(tmp_path, name, write):
    offsets, content = pyarrow.array([0, 3, 6], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"abccf\xe9")
    write(tmp_path / name, pyarrow.table({"text": pyarrow.StringArray.from_buffers(2, offsets, content)}))
    expected = (
        "(In column 0: Invalid: Invalid UTF8 sequence at string index 1); download it again, or correct its format"
    )
    assert refusal(tmp_path / name).endswith(expected)


@each_format
def test_a_repeated_column_is_refused(tmp_path, name, write):
    write(tmp_path / name, pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]))
    assert "(column 'text' is repeated)" in refusal(tmp_path / name)


def test_a_parquet_file_compressed_as_a_whole_is_refused(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    assert refusal(tmp_path / "a.parquet.gz") == (
        f"data.sources.0.path: {tmp_path}/a.parquet.gz is compressed as a whole; unpack it"
    )


def test_rows_with_values_that_are_not_text_are_bad(tmp_path):
    import datetime

    table = {"instruction": ["a"], "output": [datetime.date(2026, 1, 1)]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    message = f"{tmp_path}/a.parquet[0]: field `output` is date; expected text, put it in quotes"
    assert refusal(tmp_path / "a.parquet") == message


def test_a_dataset_of_the_hub_is_streamed_without_its_nulls(monkeypatch):
    from datasets import Dataset

    asked = []

    def load_dataset(*arguments, **keys):
        asked.append((arguments, keys))
        return Dataset.from_list([{"text": "a", "id": None}, {"text": "b", "id": 1}]).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = HubSource(type="hub", task="sums", name="some/set", subset="en", split="test", revision="abc")
    assert list(read_hub(source, "data.sources.0")) == [(0, {"text": "a"}), (1, {"text": "b", "id": 1})]
    assert asked == [(("some/set", "en"), {"split": "test", "revision": "abc", "streaming": True})]


def test_a_dataset_that_cannot_be_loaded_gives_a_one_line_error(monkeypatch):
    def load_dataset(*arguments, **keys):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        list(read_hub(HubSource(type="hub", task="sums", name="some/set"), "data.sources.0"))
    assert str(caught.value) == (
        "data.sources.0.name: cannot load some/set from the Hub (no network); check name, subset, split and network, "
        "or download it and use a source of type files"
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@each_format
def test_values_come_as_they_were_written(tmp_path, name, write):
    turns = ['{"role": "user", "content": "a", "n": 4.0}', None, "null"]
    columns = {
        "json": pyarrow.array(['{"a": null}', '"text"', "4"], pyarrow.json_()),
        "turns": pyarrow.ListArray.from_arrays(
            [0, 3, 3, 3], pyarrow.array(turns, pyarrow.json_()), mask=pyarrow.array([False, False, True])
        ),
        "map": pyarrow.array([[("a", None), ("b", 2)], [], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "numbered": pyarrow.array([[(1, "x")], [], None], pyarrow.map_(pyarrow.int32(), pyarrow.string())),
        "float": pyarrow.array([0.1, 4.0, 123456792.0], pyarrow.float32()),
        "half": pyarrow.array([0.1, 2.0, None], pyarrow.float16()),
        "bytes": pyarrow.array(["é".encode(), b"", b"\xff"], pyarrow.large_binary()),
        "words": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
        "large": pyarrow.array([["x"], [None], []], pyarrow.large_list(pyarrow.large_string())),
        "struct": pyarrow.array(
            [{"p": 0.1, "q": None}, {"p": None, "q": [b"y"]}, None],
            pyarrow.struct({"p": pyarrow.float32(), "q": pyarrow.list_(pyarrow.binary())}),
        ),
    }
    write(tmp_path / name, pyarrow.table(columns))
    turn = {"role": "user", "content": "a", "n": 4.0}
    assert records(tmp_path / name) == [
        {"json": {"a": None}, "turns": [turn, None, None], "map": {"a": None, "b": 2}, "numbered": {"1": "x"},
         "float": 0.1, "half": 0.1, "bytes": "é", "words": "a", "large": ["x"], "struct": {"p": 0.1}},
        {"json": "text", "turns": [], "map": {}, "numbered": {}, "float": 4, "half": 2, "bytes": "", "words": "b",
         "large": [None], "struct": {"q": ["y"]}},
        {"json": 4, "float": 123456792, "bytes": b"\xff", "words": "a", "large": []},
    ]  # fmt: skip


@each_format
def test_large_narrow_floats_are_the_shortest_numbers_that_give_them(tmp_path, name, write):
    write(tmp_path / name, pyarrow.table({"a": pyarrow.array([1e20, -2.5e18, 16777217.0, 3e38], pyarrow.float32())}))
    assert [record["a"] for record in records(tmp_path / name)] == [1e20, -2.5e18, 16777216, 3e38]


@each_format
def test_a_damaged_value_spoils_its_row_only(tmp_path, name, write):
    texts = pyarrow.array(['{"a": 1}', "{", '{"a": 1, "a": 2}', "[" * 100_000], pyarrow.json_())
    repeated = pyarrow.array([[("k", 1), ("k", 2)], [], [], []], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    write(tmp_path / name, pyarrow.table({"j": texts, "m": repeated}))
    assert [row.why.partition(" (")[2].partition(":")[0] for row in records(tmp_path / name)] == [
        "key 'k' is repeated); correct it",
        "Expecting property name enclosed in double quotes",
        "key 'a' is repeated); correct it",
        "maximum recursion depth exceeded while decoding a JSON array from a unicode string); correct it",
    ]


def test_a_dataset_of_the_hub_gives_values_as_they_were_written(monkeypatch):
    from datasets import Dataset, Features, Json, List, Value

    rows = [{"messages": [{"role": "user", "content": None}, {"a": 1}], "output": 0.1}]
    features = Features({"messages": List(Json()), "output": Value("float32")})
    dataset = Dataset.from_list(rows, features=features).to_iterable_dataset()
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **keys: dataset)
    source = HubSource(type="hub", task="sums", name="some/set")
    assert list(read_hub(source, "data.sources.0")) == [(0, rows[0])]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_an_empty_file_is_called_empty(tmp_path, name):
    (tmp_path / name).touch()
    assert "(it is empty, 0 bytes)" in refusal(tmp_path / name)


def test_a_parquet_file_called_arrow_is_named_and_so_is_the_reverse(tmp_path):
    table = pyarrow.table({"text": ["a"]})
    write_parquet(tmp_path / "a.arrow", table)
    write_file(tmp_path / "a.parquet", table)
    for name, kind in (("a.arrow", "parquet"), ("a.parquet", "arrow")):
        assert refusal(tmp_path / name).endswith(f"is a file in the format {kind}; set the source's `format: {kind}`")
        assert texts(read(tmp_path / name, format=kind)) == ["a"]
