"""Small files that unpack to gigabytes are refused in one line, in bounded memory."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import zlib

import pytest

from tests.data_prep.reading import read, refusal
from tests.data_prep.sources.test_compressed import zst

MEMBER = 2**24  # bytes
MEMBERS = 256  # of each bomb: 4 GiB
LIMIT = 2**31  # bytes of memory for the process that reads; without the bound it fails there
MOST = 600 * 2**20  # bytes that it uses: the imports, and a few copies of a row of 64 MiB
READ = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), int(sys.argv[1])))
from pathlib import Path
from data_prep.config import DataConfig
from data_prep.sources.read import read_blocks
from data_prep.user_error import UserError
data = json.loads(sys.argv[2])
try:
    for block in read_blocks(DataConfig.model_validate(data)):
        pass
except UserError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
LINE = b"a" * 1023 + b"\n"
BOMBS = {
    "a.jsonl.gz": (gzip.compress, b'{"text": "', b"a", {}),
    "a.txt.zst": (zst, b"", LINE, {"sample_by": "paragraph"}),
    "a.csv.bz2": (bz2.compress, b'text\n"', LINE, {}),
    "a.json.xz": (lzma.compress, b'[{"text": "', b"a", {}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_megabytes_that_unpack_to_gigabytes_of_one_row_are_refused_in_bounded_memory(tmp_path, name):
    compress, start, filling, keys = BOMBS[name]
    path = tmp_path / name
    path.write_bytes(compress(start) + compress(filling * (MEMBER // len(filling))) * MEMBERS)
    assert path.stat().st_size < MEMBER
    source = {"type": "files", "task": "t", "path": str(path), **keys}
    data = {"prepared_dir": str(tmp_path / "prepared"), "seq_len": 64, "sources": [source]}
    command = [sys.executable, "-c", READ, str(LIMIT), json.dumps(data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    error, used = done.stdout.splitlines()
    place = {"a.csv.bz2": ":2", "a.json.xz": ""}.get(name, ":1")
    assert error == f"{path}{place}: over 64 MiB in one row; split it, or look for a missing quote or line end"
    assert int(used) < MOST


@pytest.fixture
def longest(monkeypatch):
    """Rows of at most 1,000 bytes; returns how the refusal of a longer one ends."""
    for module in ("lines", "text", "json_array"):
        monkeypatch.setattr(f"data_prep.sources.{module}.LONGEST", 1000)
    return ": over 64 MiB in one row; split it, or look for a missing quote or line end"


TOO_LONG = {
    "line of JSON": ("a.jsonl", b'{"text": "ok"}\n{"text": "%s"}\n' % (b"a" * 1000), ":2", {}),
    "line of text": ("a.txt", b"ok\n" + b"a" * 1001, ":2", {"sample_by": "line"}),
    "paragraph": ("a.txt", b"ok\n\n\n" + b"aaaaaaaaa\n" * 101, ":4", {"sample_by": "paragraph"}),
    "line of a TSV": ("a.tsv", b"text\tb\nok\t1\n" + b"a" * 1001, ":3", {}),
    "line of a CSV": ("a.csv", b"text,b\nok,1\n" + b"a" * 1001, ":3", {}),
    "cells of a CSV over many lines": ("a.csv", b"text,b\nok,1\n" + b'"aaaaaaa\n",' * 100, ":3", {}),
    "lone quote in a CSV": ("a.csv", b'text\n"' + b"a\n" * 600, ":2", {}),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_a_row_that_is_too_long_is_refused_where_it_begins(tmp_path, longest, case):
    name, content, place, keys = TOO_LONG[case]
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path, **keys) == f"{path}{place}{longest}"


def test_rows_up_to_the_bound_are_read(tmp_path, longest):
    for name, content, keys in [
        ("a.jsonl", b'{"text": "%s"}\n' % (b"a" * 987) * 3, {}),
        ("a.txt", b"a" * 998 + b"\n\n" + b"b" * 998 + b"\n\n", {"sample_by": "paragraph"}),
        ("a.csv", b"text\n" + (b'"' + b"a\n" * 400 + b'"\n') * 3, {}),
    ]:
        (tmp_path / name).write_bytes(content)
        assert len(read(tmp_path / name, **keys)) == (2 if name == "a.txt" else 3)


def test_an_object_of_endless_keys_is_not_kept(tmp_path, monkeypatch):
    """Which keys stand beside the rows is remembered, so their number is bounded."""
    monkeypatch.setattr("data_prep.sources.json_layout._MOST_OF_KEYS", 1000)
    path = tmp_path / "a.json"
    path.write_bytes(b"{" + b",".join(b'"k%d": 1' % number for number in range(1000)) + b',"data": [{"text": "a"}]}')
    assert refusal(path).startswith(f"{path}:1: ")


def test_an_xz_file_that_asks_for_gigabytes_to_be_unpacked_is_refused(tmp_path):
    path = tmp_path / "a.txt.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**20}]
    packed = lzma.compress(b"text" * 100, filters=filters)
    path.write_bytes(with_dictionary(packed, 40))
    assert refusal(path) == (
        f"data.sources.0.path: cannot read {path} (Memory usage limit exceeded); compress it again with a smaller "
        "dictionary, as `xz -9` does"
    )


def with_dictionary(packed: bytes, code: int) -> bytes:
    """The .xz file with another size of its dictionary in the block's header; 40: 4 GiB - 1 (xz-file-format 5.3.1)"""
    at = 12  # after the stream's header
    size = (packed[at] + 1) * 4
    header = bytearray(packed[at : at + size - 4])
    header[header.index(b"\x21\x01") + 2] = code  # filter id of LZMA2, one byte of properties
    checksum = zlib.crc32(header).to_bytes(4, "little")
    return packed[:at] + bytes(header) + checksum + packed[at + size :]


def test_a_zstd_frame_that_asks_for_gigabytes_is_refused(tmp_path):
    path = tmp_path / "a.txt.zst"
    descriptor, window_log_31 = b"\0", bytes([(31 - 10) << 3])  # RFC 8878, 3.1.1.1
    path.write_bytes(b"\x28\xb5\x2f\xfd" + descriptor + window_log_31 + b"\x01\0\0")
    assert "memory" in refusal(path)


def test_archives_are_never_unpacked(tmp_path):
    names = {"a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.jsonl.tar.xz"}
    for name in names:
        path = tmp_path / name
        path.write_bytes(b"PK\x03\x04" if name == "a.zip" else b"x")
        assert refusal(path) == f"data.sources.0.path: {path} is an archive; unpack it, and give the folder"
    assert {each.name for each in tmp_path.iterdir()} == names
