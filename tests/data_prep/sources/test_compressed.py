"""Compressed files read like plain ones, and truncated files are always refused."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from data_prep.documents import Document
from tests.data_prep.reading import places, read, refusal, texts

LINES = b"".join(
    json.dumps({"instruction": f"What is {i} + {i}?", "output": str(2 * i)}).encode() + b"\n" for i in range(400)
)
ARRAY = b"[" + b",".join(LINES.splitlines()) + b"]"
TABLE = b"instruction,output\n" + b"".join(b"What is %d + %d?,%d\n" % (i, i, 2 * i) for i in range(400))
CONTENTS = {"a.jsonl": LINES, "a.json": ARRAY, "a.csv": TABLE, "a.txt": LINES}


def zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}
each_compression = pytest.mark.parametrize(("ending", "compress"), COMPRESSIONS.items(), ids=COMPRESSIONS.keys())


def said(documents: list[Document]) -> list[tuple[str, object]]:
    return list(zip(places(documents), texts(documents), strict=True))


@each_compression
@pytest.mark.parametrize("name", CONTENTS)
def test_a_compressed_file_reads_as_the_plain_one(tmp_path, name, ending, compress):
    (tmp_path / name).write_bytes(CONTENTS[name])
    (tmp_path / (name + ending)).write_bytes(compress(CONTENTS[name]))
    plain = said(read(tmp_path / name))
    assert said(read(tmp_path / (name + ending))) == plain
    assert len(plain) == (1 if name == "a.txt" else 400)


@each_compression
def test_a_compressed_file_of_several_members_is_read_to_its_end(tmp_path, ending, compress):
    path = tmp_path / ("a.jsonl" + ending)
    cut = 5000  # within a line
    path.write_bytes(compress(b"") + compress(LINES[:cut]) + compress(LINES[cut:]))
    assert [place for place, _ in said(read(path))] == [f":{number}" for number in range(1, 401)]


@each_compression
@pytest.mark.parametrize("name", CONTENTS)
def test_every_truncated_file_is_refused(tmp_path, name, ending, compress):
    path = tmp_path / (name + ending)
    whole = compress(CONTENTS[name])
    for length in (1, 3, 11, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:length])
        message = refusal(path)
        assert message.startswith(f"data.sources.0.path: cannot read {path} (")
        assert message.endswith("); it is truncated or damaged, download it again")


@each_compression
def test_a_truncated_second_member_is_refused(tmp_path, ending, compress):
    path = tmp_path / ("a.jsonl" + ending)
    member = compress(LINES)
    path.write_bytes(member + member[: len(member) // 2])
    assert refusal(path).endswith("); it is truncated or damaged, download it again")


@each_compression
def test_a_plain_file_with_the_ending_of_a_compression_is_refused(tmp_path, ending, compress):
    path = tmp_path / ("a.jsonl" + ending)
    path.write_bytes(LINES)
    assert refusal(path).endswith(f"); it is not compressed, remove {ending} from its name")


@each_compression
def test_a_compressed_file_without_the_ending_is_refused(tmp_path, ending, compress):
    for name in ("a.jsonl", "a.txt", "a.csv", "a.jsonl.gz" if ending != ".gz" else "a.jsonl.xz"):
        path = tmp_path / name
        path.write_bytes(compress(LINES))
        assert refusal(path) == (
            f"data.sources.0.path: {path} is compressed ({ending}), which its name does not say; unpack it, or end its "
            f"name in {ending}"
        )


@each_compression
def test_a_file_compressed_twice_is_refused(tmp_path, ending, compress):
    path = tmp_path / ("a.jsonl" + ending)
    path.write_bytes(compress(compress(LINES)))
    assert f"{path} is compressed ({ending}), which its name does not say" in refusal(path)


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])  # pyarrow's .zst have no checksum
def test_bytes_that_changed_within_a_compressed_file_are_refused(tmp_path, ending):
    path = tmp_path / ("a.jsonl" + ending)
    whole = bytearray(COMPRESSIONS[ending](LINES))
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    assert str(path) in refusal(path)


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_members_behind_each_other_are_all_read_and_a_damaged_second_one_is_refused(tmp_path, ending):
    path = tmp_path / ("a.jsonl" + ending)
    member = COMPRESSIONS[ending](LINES)
    path.write_bytes(member + b"\0" * 8 + member)
    assert len(read(path)) == 2 * LINES.count(b"\n")
    for damaged in (b"BAD" + member[3:], member[:-9]):
        path.write_bytes(member + damaged)
        assert f"cannot read {path}" in refusal(path)


@each_compression
def test_a_compressed_file_that_has_vanished_is_not_called_truncated(tmp_path, monkeypatch, ending, compress):
    gone = tmp_path / ("a.jsonl" + ending)
    monkeypatch.setattr("data_prep.sources.read.find_files", lambda source, key: ([Path(gone)], []))
    message = refusal(gone)
    assert message.startswith(f"data.sources.0.path: cannot read {gone} (")
    assert "No such file or directory" in message
    assert message.endswith("); give a readable file")
